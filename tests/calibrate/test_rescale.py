"""Factors and shifts move into the weights around a tensor: the function stays, with and without clips."""

from dataclasses import replace

import pytest
import torch
from models import CASES
from torch import nn
from uneven_chains import images, prepared_chain, rescaled_function

from lightning_quant.calibrate.equalization import equalize
from lightning_quant.calibrate.groups import scaling_groups
from lightning_quant.calibrate.recalibrate import recalibrate
from lightning_quant.calibrate.rescale import along_columns, along_rows, folded_layer, rescale
from lightning_quant.calibrate.smoothing import smooth
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise


@pytest.mark.parametrize(("activation", "clip"), [(nn.ReLU, float("inf")), (nn.ReLU6, 6.0)])
@pytest.mark.parametrize("algorithm", ["equalize", "smooth"])
def test_the_float_function_stays(activation: type[nn.Module], clip: float, algorithm: str) -> None:
    model, prepared, calls = prepared_chain(activation)
    groups = [group for group in scaling_groups(prepared) if not group.from_float]
    assert [group.clip for group in groups] == [clip, clip]
    number = equalize(prepared, groups, calls) if algorithm == "equalize" else smooth(prepared, groups, calls)
    assert number == 2
    assert any((prepared.channels[edge].factor - 1).abs().max() > 0.5 for edge in prepared.channels)
    x = images(8, seed=5)
    torch.testing.assert_close(rescaled_function(prepared, x, clip), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_factor_on_every_group_keeps_the_simulation_of_every_net(case) -> None:
    model = case.build()
    args, kwargs = case.call(4)
    prepared = prepare(model, args, kwargs, recipe="int8", observer="min_max")
    calls = [case.call(4) for _ in range(3)]
    recalibrate(prepared, calls)
    generator = torch.Generator().manual_seed(3)
    for group in scaling_groups(prepared):
        rescale(prepared, group, 0.7 + 0.3 * torch.rand(group.channels, generator=generator))
    recalibrate(prepared, calls)
    args, kwargs = calls[0]
    with torch.no_grad(), prepared.attached("frozen"):
        simulated = model(*args, **kwargs)
    assert signal_to_noise(model(*args, **kwargs), simulated) > 22
    check_agreement(prepared, convert(prepared), args, kwargs)


def test_columns_of_grouped_weights() -> None:
    weight = torch.ones(4, 2, 1, 1)
    expected = torch.tensor([[1.0, 2], [1, 2], [3, 4], [3, 4]])
    assert torch.equal(along_columns(torch.tensor([1.0, 2, 3, 4]), weight).flatten(1), expected)


def test_what_was_rounded_before_stays_where_whole_channels_are_rescaled_and_is_rounded_anew_elsewhere() -> None:
    _, prepared, _ = prepared_chain(nn.ReLU)
    for name in (":layers.0", ":layers.3", ":layers.6"):
        layer, scale = folded_layer(prepared, name), prepared.folded(name).scale
        prepared.layers[name] = replace(
            layer, scale=scale, integers=torch.floor(layer.weight / along_rows(scale, layer.weight))
        )
    before = dict(prepared.layers)
    (group,) = [group for group in scaling_groups(prepared) if group.consumers == (":layers.3",)]
    rescale(prepared, group, torch.linspace(0.5, 1, 12))
    for name, factor in ((":layers.0", 1 / torch.linspace(0.5, 1, 12)), (":layers.3", torch.linspace(0.5, 1, 12))):
        assert torch.equal(prepared.layers[name].integers, before[name].integers)
        torch.testing.assert_close(prepared.layers[name].scale, before[name].scale * factor)
    (group,) = [group for group in scaling_groups(prepared) if group.consumers == (":layers.6",)]
    rescale(prepared, group, torch.linspace(0.5, 1, 12))
    assert prepared.layers[":layers.6"].integers is None
