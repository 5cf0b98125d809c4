"""Noise and histograms of operators against their definitions."""

import itertools
import math

import pytest
import torch
from torch import nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.calls import Call
from lightning_quant.export.prepare import prepare
from lightning_quant.measure.operator_numbers import NUM_WORST, OperatorNumbers, operator_numbers
from lightning_quant.measure.sensitivity import sensitivity
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.simulate.prepared import Prepared

PLAIN = Recipe(bias_correction=False, calibration_observer="min_max")


def net(widths: tuple[int, ...] = (6, 12, 12, 4)) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*parts[:-1]).eval()


def calibrated(model: nn.Module, *calls: torch.Tensor) -> Prepared:
    prepared = prepare(model, (calls[0],), recipe=PLAIN, observer="min_max")
    calibrate(prepared, steps_of(prepared, [(x,) for x in calls]))
    return prepared


def looked_at(model: nn.Module, x: torch.Tensor, *calls: torch.Tensor) -> dict[str, OperatorNumbers]:
    return {one.name: one for one in operator_numbers(calibrated(model, *calls), Call((x,)))}


def test_own_noise_is_that_of_sensitivity_and_all_noise_adds_up() -> None:
    model, x = net(), torch.randn(64, 6)
    prepared = calibrated(model, x)
    found = {one.name: one for one in operator_numbers(prepared, Call((x,)))}
    ranked = {layer.name: layer for layer in sensitivity(prepared, [Call((x,))]).layers}

    assert found.keys() == ranked.keys()
    # Sensitivity runs the whole module with that operator rounded, which is another way to the same number.
    for name in ("2", "4"):
        assert found[name].own_db == pytest.approx(ranked[name].own_db, abs=0.5)
    assert found["2"].db is not None
    assert found["2"].db < found["2"].own_db


def test_histograms_are_of_the_values_beside_their_grid() -> None:
    model, x = net(), torch.randn(200, 6)
    # Calibration has seen half of the range.
    found = looked_at(model, 2 * x, x)["2"]
    values = model[:4](2 * x).detach()

    assert found.output is not None
    assert sum(found.output.counts) == values.numel()
    assert (found.output.start, found.output.stop) == pytest.approx((0.0, float(values.max())), abs=1e-5)
    beyond = float((values > found.output.high + found.output.step / 2).double().mean())
    assert found.output.clipped == pytest.approx(beyond)
    assert beyond > 0
    assert found.weight is not None
    assert (found.weight.low, found.weight.high) == (-127, 127)
    assert sum(found.weight.counts) == model[2].weight.numel()
    assert found.weight.clipped == 0


def test_only_the_worst_have_histograms() -> None:
    model = net((6, *[8] * (NUM_WORST + 3), 3))
    found = looked_at(model, torch.randn(16, 6), torch.randn(16, 6)).values()

    drawn = [one for one in found if one.weight is not None or one.output is not None]
    assert len(drawn) == NUM_WORST
    assert max(one.own_db for one in drawn) <= min(one.own_db for one in found if one not in drawn)


def test_an_output_of_zeros_is_no_division_by_zero() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()
    found = looked_at(model, torch.randn(8, 6), torch.randn(8, 6))["2"]

    assert found.own_db == found.db == math.inf
