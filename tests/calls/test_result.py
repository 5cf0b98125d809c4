"""Results of any shape are described in JSON, and built from the description and their tensors alone."""

import json
import math
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_quant.calls.result import build, freeze, indices, plain, structure_of
from lightning_quant.errors import ExportError

A, B = torch.zeros(1), torch.ones(1)
Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Output:
    logits: Any
    loss: Any = None


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (A, ["output"]),
        ((A, [B, 3]), ["output_0", "output_1_0"]),
        ({"boxes": A, 7: {"scores": B}}, ["boxes", "output_7_scores"]),
        (((), math.inf, None, "label", A), ["output_4"]),
    ],
)
def test_results_are_built_again_from_json(result: Any, names: list[str]) -> None:
    leaves: list[Any] = []
    found: list[str] = []
    structure = json.loads(json.dumps(structure_of(result, leaves, found), allow_nan=False))
    assert indices(structure) == list(range(len(leaves)))
    assert found == names
    again = build(structure, leaves)
    assert repr(again) == repr(result)


@pytest.mark.parametrize("result", [Pair(A, (B, None)), torch.return_types.max((A, B))])
def test_named_tuples_are_unpacked_and_answer_to_names(result: Any) -> None:
    leaves: list[Any] = []
    structure = json.loads(json.dumps(structure_of(result, leaves)))
    again = build(structure, leaves)
    first, second = again
    assert first is A
    assert repr(second) == repr(result[1])
    names = getattr(result, "_fields", None) or type(result).__match_args__
    assert again._fields == tuple(names)
    assert again[names[0]] is again[0] is again.get(names[0]) is dict(again.items())[names[0]]
    assert (*again.keys(), again.get("missing", 3)) == (*names, 3)
    assert type(again) is type(build(structure, leaves))
    assert indices(structure) == [0, 1]


def test_lists_and_tuples_of_other_classes_are_lists_and_tuples() -> None:
    leaves: list[Any] = []
    assert build(structure_of([torch.Size([2]), A], leaves), leaves) == [(2,), A]


def test_dataclasses_become_records_that_answer_to_name_and_position() -> None:
    leaves: list[Any] = []
    record = build(structure_of(Output(A), leaves), leaves)
    first = next(iter(record))
    assert record[first] is record[0] is getattr(record, first) is A
    with pytest.raises(AttributeError, match="no field 'hidden' among"):
        _ = record.hidden


def test_other_classes_are_refused() -> None:
    with pytest.raises(ExportError, match=r"lists, dicts or dataclasses, but got set.*`module=\.\.\.`"):
        structure_of({A}, [])


@pytest.mark.parametrize(
    "structure",
    [
        {"tensor": True},
        {"tensor": "0"},
        {"set": []},
        {"dict": [[[0], {"tensor": 0}]]},
        {"record": {"": {"tensor": 0}}},
        {"named_tuple": {"_replace": {"tensor": 0}}},
    ],
)
def test_forged_descriptions_are_refused(structure: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        indices(structure)


def test_values_survive_json() -> None:
    values = [math.inf, -math.inf, 0.5, None, True, "text"]
    assert freeze(json.loads(json.dumps([plain(value) for value in values], allow_nan=False))) == tuple(values)
