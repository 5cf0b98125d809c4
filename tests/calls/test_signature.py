"""How an artifact is called, in JSON and back, without the user's code."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_quant.calls.calls import CapturedCall, flatten_call, forward_signature
from lightning_quant.calls.signature import Signature, make_signature, output_names, tensor_leaves
from lightning_quant.errors import ArtifactError, FixedSizesError, QuantizationError

X, MASK = torch.randn(4, 3), torch.ones(4, dtype=torch.bool)


def forward(x: Tensor, mask: Tensor, *, factor: float = 2.0) -> dict[str, Any]:
    return {"scores": x * factor, "parts": (x, mask)}


def signature() -> Signature:
    own = forward_signature(forward)
    spec, tensors = flatten_call(own, (X, MASK), {"factor": 2.0})
    call = CapturedCall(own, spec, tensors, {"x": {0: "batch"}, "mask": {0: "batch"}})
    return make_signature(call, forward(X, MASK), [(0, 1)] * 3)


def test_it_is_the_same_when_json_has_held_it() -> None:
    made = signature()
    read = Signature.from_dict(json.loads(json.dumps(made.to_dict())))

    assert read == made
    assert [(info.name, info.dtype, info.shape) for info in made.inputs] == [
        ("x", "float32", ("batch", 3)),
        ("mask", "bool", ("batch",)),
    ]
    assert [info.name for info in made.outputs] == output_names(forward(X, MASK), ("x", "mask"))
    assert [info.shape for info in made.outputs] == [("batch", 3), ("batch", 3), ("batch",)]


def test_calls_are_bound_however_they_are_written_and_results_are_built_again() -> None:
    made = signature()
    for args, kwargs in (((X, MASK), {}), ((X,), {"mask": MASK}), ((), {"mask": MASK, "x": X, "factor": 2.0})):
        assert all(map(torch.equal, made.flatten(args, kwargs), (X, MASK)))
    result = made.unflatten(tensor_leaves(forward(X, MASK)))
    assert torch.equal(result["scores"], 2 * X)
    assert torch.equal(result["parts"][1], MASK)
    assert made.arguments([X, MASK]) == {"x": X, "mask": MASK, "factor": 2.0}


def test_other_constants_and_missing_tensors_are_refused_and_unread_ones_may_be_left_out() -> None:
    made = signature()
    with pytest.raises(QuantizationError, match=r"constants of the captured call, factor=2.0, but got factor=3.0"):
        made.flatten((X, MASK), {"factor": 3.0})
    with pytest.raises((QuantizationError, TypeError), match="mask"):
        made.flatten((X,), {})
    optional = dataclasses.replace(made, optional=("mask",))
    x, mask = optional.flatten((X,), {})
    assert torch.equal(x, X)
    assert mask.shape == (4,)


def test_the_answer_to_a_call_that_decides_otherwise_is_an_error() -> None:
    made = dataclasses.replace(signature(), decisions=("x.sum() > 0",))
    made.check_decided([X])
    with pytest.raises(FixedSizesError, match=r"a call in which x\.sum\(\) > 0"):
        made.check_decided([torch.full((2,), torch.nan)])


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": None},
        {"inputs": [{"name": "x", "dtype": "system", "shape": [1]}]},
        {"inputs": [{"name": "x", "dtype": "float32", "shape": [-1]}]},
        {"parameters": [["x", "NO_KIND", "required"]]},
        {"structure": {"tensor": 7}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_what_is_no_signature_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="a call signature in the manifest"):
        Signature.from_dict({**signature().to_dict(), **change})
