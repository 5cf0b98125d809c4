"""What is looked at for the page, and that it costs no report."""

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.calls import Call
from lightning_quant.errors import NoEffectWarning
from lightning_quant.export.prepare import prepare
from lightning_quant.measure.changed_predictions import Predictions, alone
from lightning_quant.measure.output_noise import HeldOut
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.report import closer_look as module
from lightning_quant.report.closer_look import closer_look
from lightning_quant.simulate.prepared import Prepared


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Prepared:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(16, 6)
    found = prepare(model, (x,), recipe=Recipe(bias_correction=False))
    calibrate(found, steps_of(found, [(x,)]))
    monkeypatch.setattr(type(found.runtime), "operator_ms", lambda *_: {"0": 1.5})
    return found


def looked(prepared: Prepared, held: HeldOut | None) -> tuple[dict, dict]:
    numbers, changed = closer_look(
        prepared,
        (prepared.root, prepared.root),  # type: ignore[arg-type]
        Path("model.onnx"),
        1,
        held=held,
        predictions=Predictions(functools.partial(alone, prepared)),
    )
    return numbers.to_dict(), changed.to_dict()


def test_held_calls_are_compared_where_no_validation_ran(prepared: Prepared) -> None:
    held = HeldOut((Call((torch.randn(20, 6),)),), "a held call")
    numbers, changed = looked(prepared, held)

    assert [one["name"] for one in numbers["numbers"]] == ["0", "2"]
    assert numbers["operator_ms"] == {"0": 1.5}
    assert (changed["changed"]["num_samples"], changed["changed"]["num_changed"]) == (20, 0)
    assert changed["changed"]["base"] == "a held call"
    assert looked(prepared, None)[1] == {"changed": None}


def test_a_large_net_is_not_looked_at(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MULTIPLY_ADDS", 1)
    assert looked(prepared, None)[0]["numbers"] == ()


def test_what_fails_costs_the_page_alone(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "operator_numbers", _fail)
    with pytest.warns(NoEffectWarning, match="lacks a closer look: RuntimeError"):
        numbers, changed = looked(prepared, None)
    assert (numbers, changed) == ({"numbers": (), "operator_ms": {}}, {"changed": None})


def _fail(*_: object) -> None:
    raise RuntimeError("odd graph")
