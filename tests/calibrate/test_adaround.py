"""Learned rounding never makes a layer worse, and beats rounding to nearest where the grid is coarse."""

import torch
from models import CASES
from torch import nn
from uneven_chains import smooth_like

from lightning_quant.calibrate.adaround import adaround
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.prepare import prepare
from lightning_quant.recipe.recipe import IntegerSpec, Recipe
from lightning_quant.simulate.prepared import Prepared


def prepared_case(name: str, bits: int) -> tuple[Prepared, list]:
    case = next(case for case in CASES if case.name == name)
    model = case.build()
    calls = [((smooth_like(case.call(16)[0][0], seed),), {}) for seed in range(4)]
    recipe = Recipe(weight=IntegerSpec(bits=bits, symmetric=True, per_channel=True))
    prepared = prepare(model, *calls[0], recipe=recipe, observer="mse")
    calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
    return prepared, calls


def test_no_layer_gets_worse_and_a_coarse_grid_gets_better() -> None:
    prepared, calls = prepared_case("residual", 3)
    results = adaround(prepared, calls, iterations=200)
    assert len(results) == sum(bool(operator.weight) for operator in prepared.operators.values())
    assert all(result.learned <= result.nearest for result in results)
    assert sum(result.learned for result in results) < 0.8 * sum(result.nearest for result in results)


def test_every_weight_is_rounded_up_or_down() -> None:
    prepared, calls = prepared_case("mlp", 4)
    adaround(prepared, calls, iterations=100)
    assert prepared.layers
    for layer in prepared.layers.values():
        exact = layer.weight / layer.scale.unsqueeze(1)
        assert bool((layer.integers - exact).abs().max() < 1)
        assert bool((layer.integers.abs() <= 7).all())
        assert torch.equal(layer.integers, layer.integers.round())


def test_calls_of_different_sizes_count_alike() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    calls = [((smooth_like(torch.empty(8, 3, size, size), size),), {}) for size in (6, 9, 12)]
    recipe = Recipe(weight=IntegerSpec(bits=3, symmetric=True, per_channel=True))
    prepared = prepare(model, *calls[0], recipe=recipe, observer="mse")
    calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
    results = adaround(prepared, calls, iterations=100)
    assert len(results) == 2
    assert all(result.learned <= result.nearest for result in results)
    assert sum(result.learned for result in results) < 0.9 * sum(result.nearest for result in results)
