"""Coarse weights get scales and rounding of less error."""

import pytest
import torch
from models import CASES
from torch import Tensor, nn
from uneven_chains import smooth_like

from lightning_quant.calibrate import weight_rounding
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.fit import output_snr
from lightning_quant.calibrate.lockstep import Site, lockstep
from lightning_quant.calibrate.output_correction import correct_outputs
from lightning_quant.calibrate.rescale import folded_layer
from lightning_quant.calibrate.weight_rounding import gptq_layers, inputs_of_outputs, shrink_scales
from lightning_quant.calls.calls import Call
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
    nearest = output_snr(prepared, calls)
    shrink_scales(prepared)
    assert gptq_layers(prepared, calls) >= 3
    assert output_snr(prepared, calls) > nearest + 1
    # Corrections belong to the integers that the layers have now: doing them again changes next to nothing.
    rounded = output_snr(prepared, calls)
    correct_outputs(prepared, calls)
    assert output_snr(prepared, calls) == pytest.approx(rounded, abs=0.3)
    assert all(layer.integers is None or int(layer.integers.abs().max()) <= 7 for layer in prepared.layers.values())
    check_agreement(prepared, convert(prepared), *calls[0])


class Strided(nn.Module):
    """Convolutions of one and two dimensions with every option, in one, some and as many groups as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.two = nn.Conv2d(8, 8, (3, 1), groups=8, padding="same")
        self.three = nn.Conv2d(8, 6, 2, groups=2, dilation=2, padding=(1, 0))
        self.four = nn.Conv1d(6, 5, 3, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.four(torch.relu(self.three(torch.relu(self.two(torch.relu(self.one(x)))))).flatten(2))


def test_what_an_output_is_computed_from_gives_that_output() -> None:
    torch.manual_seed(0)
    model = Strided().eval()
    calls = [((torch.randn(3, 4, 12, 12, generator=torch.Generator().manual_seed(seed)),), {}) for seed in range(2)]
    prepared = prepare(model, *calls[0], recipe=Recipe(), observer="mse")
    calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
    seen = []

    def visit(site: Site) -> None:
        x, weight = site.float_inputs[0], folded_layer(prepared, site.identity).weight
        groups = site.options.get("groups", 1)
        rows = inputs_of_outputs(x, weight, site, 10**6)
        outputs = rows @ weight.view(groups, -1, rows.shape[2]).transpose(1, 2)
        exact = site.compute(x, weight, None).flatten(2).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(outputs.transpose(0, 1).flatten(1), exact, atol=1e-5, rtol=1e-5)
        seen.append(site.operator.kind)

    lockstep(prepared, calls, visit, quantized=False)
    assert seen == ["conv2d", "conv2d", "conv2d", "conv1d"]


def test_layers_in_groups_are_rounded_as_well() -> None:
    case = next(case for case in CASES if case.name == "depthwise")
    model = case.build()
    calls = [((smooth_like(case.call(16)[0][0], seed),), {}) for seed in range(4)]
    recipe = Recipe(weight=IntegerSpec(bits=4, symmetric=True, per_channel=True))
    prepared = prepare(model, *calls[0], recipe=recipe, observer="mse")
    calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
    grouped = {i for i, operator in prepared.operators.items() if operator.weight and prepared.weight(i).shape[1] == 1}
    nearest = output_snr(prepared, calls)
    gptq_layers(prepared, calls)
    assert grouped & set(prepared.layers)
    assert output_snr(prepared, calls) > nearest


def test_layers_of_very_many_inputs_keep_rounding_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.rand(64, 24)
    prepared = prepare(model, (x,))
    calibrate(prepared, steps_of(prepared, [x]))
    monkeypatch.setattr(weight_rounding, "_MOST_INPUTS", 8)
    monkeypatch.setattr(weight_rounding, "_round", lambda prepared, site: rounded.append(site.identity) or True)
    rounded: list[str] = []

    assert gptq_layers(prepared, [Call((x,))]) == 1
    assert rounded == [list(prepared.operators)[1]]
