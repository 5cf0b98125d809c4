"""Coarse weights get scales and rounding of less error."""

import pytest
import torch
from models import CASES
from uneven_chains import smooth_like

from lightning_quant.calibrate import ladder
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.output_correction import correct_outputs
from lightning_quant.calibrate.weight_rounding import gptq_layers, least_error_scale, shrink_scales
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.export.prepare import prepare
from lightning_quant.recipe.recipe import IntegerSpec, Recipe


def test_coarse_weights_get_scales_and_rounding_of_less_error() -> None:
    case = next(case for case in CASES if case.name == "residual")
    model = case.build()
    calls = [((smooth_like(case.call(16)[0][0], seed),), {}) for seed in range(4)]
    recipe = Recipe(weight=IntegerSpec(bits=4, symmetric=True, per_channel=True))
    prepared = prepare(model, *calls[0], recipe=recipe, observer="mse")
    calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
    nearest = ladder.output_snr(prepared, calls)
    shrink_scales(prepared)
    assert gptq_layers(prepared, calls) >= 3
    assert ladder.output_snr(prepared, calls) > nearest + 1
    # Corrections belong to the integers that the layers have now: doing them again changes next to nothing.
    rounded = ladder.output_snr(prepared, calls)
    correct_outputs(prepared, calls)
    assert ladder.output_snr(prepared, calls) == pytest.approx(rounded, abs=0.3)
    assert all(layer.integers is None or int(layer.integers.abs().max()) <= 7 for layer in prepared.layers.values())
    check_agreement(prepared, convert(prepared), *calls[0])
    weight = torch.tensor([[1.0] + [0.1] * 63])
    natural = torch.tensor([1.0 / 7])
    assert float(least_error_scale(weight, natural, 7)) < 0.9 * float(natural)
