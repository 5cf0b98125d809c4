import functools
from typing import Any

import pytest
import torch
from coarse_nets import Coarse
from features import feature
from torch import nn

from lightning_quant import quantize
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.calls import Call
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection
from lightning_quant.search.candidates import Candidates
from lightning_quant.search.choice import FLOAT, STORED, WIDE, Choice
from lightning_quant.search.relaxations import Relaxations, relaxations

# Without the steps for accuracy, which are no matter of the ranking, and with four bits in every layer.
FOUR_BITS = {"name": "int4_weights", "accuracy_steps": [], "wide_ends": False}


def ranked(recipe: Any, bad: int = 2) -> Relaxations:
    torch.manual_seed(0)
    calls = [Call((torch.randn(16, 16),)) for _ in range(3)]
    prepared = prepare(Coarse(16, bad), calls[0].args, recipe=recipe, trains=False)
    calibrate(prepared, steps_of(prepared, calls[:2]))
    return relaxations(prepared, calls[2:])


@pytest.mark.parametrize("bad", [1, 2, 3])
def test_a_weight_that_four_bits_do_not_hold_gets_eight_first(bad: int) -> None:
    found = ranked(FOUR_BITS, bad)
    assert found.steps()[0].kept == ((f"layers.{bad}", WIDE),)
    (part,) = (part for part in found.parts if part.is_weight and part.users == {f"layers.{bad}"})
    # Sixteen times as fine a grid leaves a small part of the noise.
    assert part.remaining({f"layers.{bad}": WIDE}) < 0.02 * part.error
    assert found.prices["layers.0", WIDE] == found.prices["layers.0", STORED] == 16 * 16 / 2


def test_only_weights_of_few_bits_that_nobody_spoke_for_are_widened() -> None:
    assert not any(scheme == WIDE for _, scheme in ranked("int8").prices)
    assert not any(scheme == WIDE for _, scheme in ranked("int8_reduce_range").prices)
    own = ranked({**FOUR_BITS, "overrides": {"layers.1": "int5_weights", "layers.2": FLOAT}})
    assert {name for name, scheme in own.prices if scheme == WIDE} == {"layers.0", "layers.3"}


def test_corrections_of_biases_are_those_of_the_bits_that_weights_have() -> None:
    torch.manual_seed(0)
    calls = [Call((torch.randn(16, 16),)) for _ in range(3)]
    whole = prepare(Coarse(16, 2), calls[0].args, recipe=FOUR_BITS, trains=False)
    calibrate(whole, steps_of(whole, calls))
    made = Candidates(whole, calls, Selection()).make(Choice((("layers.2", WIDE),)))
    few, many = (model.bias_corrections[":layers.2"].norm() for model in (whole, made))
    assert many < 0.1 * few
    assert torch.equal(made.bias_corrections[":layers.1"], whole.bias_corrections[":layers.1"])


@feature("Trainer", "limits that are searched: 4 to 8 bits by layer", only="PTQ")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
def test_a_search_over_four_bits_ends_with_eight_where_they_are_needed(
    tmp_path: Any, unmeasured: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Candidates, "accurate", lambda _: None)
    torch.manual_seed(0)
    model, inputs = Coarse(16, 2), torch.randn(256, 16)
    exact = model(inputs)

    def close(module: nn.Module) -> Any:
        return {"close": ((module(inputs) - exact).norm(dim=1) < 0.1 * exact.norm(dim=1)).float()}

    make = functools.partial(quantize, model, FOUR_BITS, "torch", calibration_data=inputs.split(64), evaluate=close)
    report = make(output_dir=tmp_path, limits={"close": -0.1}).report
    assert report is not None
    assert report["search"]["verdicts"][0]["kept"]
    assert report["search"]["chosen"]["kept"]["layers.2"] == WIDE
