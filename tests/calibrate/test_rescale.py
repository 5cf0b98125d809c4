"""Factors and shifts move into the weights around a tensor: the function stays, with and without clips."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import CASES, with_statistics
from torch import Tensor, nn

from lightning_quant.calibrate.absorption import absorb
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.equalization import equalize, equalizing_factor
from lightning_quant.calibrate.groups import scaling_groups
from lightning_quant.calibrate.recalibrate import recalibrate
from lightning_quant.calibrate.rescale import along_columns, rescale
from lightning_quant.calibrate.smoothing import column_maximum, smooth, smoothing_factor
from lightning_quant.convert.convert import check_agreement, convert
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.simulate.prepared import Prepared


class Chain(nn.Module):
    """Expand, depthwise without padding, project: an inverted residual block with very different channels."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 12, 1, bias=False),
            nn.BatchNorm2d(12),
            activation(),
            nn.Conv2d(12, 12, 3, groups=12, bias=False),
            nn.BatchNorm2d(12),
            activation(),
            nn.Conv2d(12, 4, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


def uneven(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = with_statistics(Chain(activation)).eval()
    with torch.no_grad():
        model.layers[1].weight.mul_(torch.logspace(-2, 0.7, 12))
        model.layers[4].weight.mul_(torch.logspace(0.5, -1.5, 12))
    return model


def images(number: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def prepared_chain(activation: type[nn.Module]) -> tuple[nn.Module, Prepared, list]:
    model = uneven(activation)
    calls = [((x,), {}) for x in images().split(4)]
    prepared = prepare(model, (images(4),), recipe="int8", observer="mse")
    calibrate(prepared, steps_of(prepared, [call[0] for call in calls]))
    return model, prepared, calls


def rescaled_function(prepared: Prepared, x: Tensor, clip: float) -> Tensor:
    """Compute the chain in float from the rescaled layers alone, with one clip per channel."""
    names = [":layers.0", ":layers.3", ":layers.6"]
    edges = [":layers.2", ":layers.5"]
    for name, edge, groups in zip(names[:2], edges, (1, 12), strict=True):
        layer, channels = prepared.layers[name], prepared.channels[edge]
        x = F.conv2d(x, layer.weight, layer.bias, groups=groups)
        bound = ((clip - channels.shift) / channels.factor).view(1, -1, 1, 1)
        x = torch.minimum(x.clamp(min=0), bound)
    layer = prepared.layers[names[2]]
    return F.conv2d(x, layer.weight, layer.bias)


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


def test_equalization_makes_the_ranges_of_both_weights_equal() -> None:
    _, prepared, calls = prepared_chain(nn.ReLU)
    equalize(prepared, scaling_groups(prepared), calls, rounds=20)
    written = prepared.layers[":layers.0"].weight.abs().flatten(1).amax(1)
    read = column_maximum([prepared.layers[":layers.3"].weight], 12)
    torch.testing.assert_close(written, read, rtol=1e-3, atol=0)
    factor = equalizing_factor(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 3.0]))
    assert torch.equal(factor, torch.tensor([2.0, 1.0]))


def test_a_clipping_grid_never_ends_above_the_clip_nor_below_what_was_seen() -> None:
    model, prepared, calls = prepared_chain(nn.ReLU6)
    seen = model.layers[:3](torch.cat([call[0][0] for call in calls])).amax((0, 2, 3))
    equalize(prepared, scaling_groups(prepared), calls)
    recalibrate(prepared, calls)
    scale, zero_point = prepared.ranges.parameters(":layers.2")
    assert (255 - zero_point) * scale <= 6.0 + 1e-4
    factor = prepared.channels[":layers.2"].factor
    assert bool((factor <= 1 + 1e-6).all())
    assert bool((factor * 6.0 >= seen - 1e-4).all())


def test_scaling_makes_uneven_channels_accurate_and_exports() -> None:
    model, prepared, calls = prepared_chain(nn.ReLU6)
    x = images(32, seed=7)

    def quality() -> float:
        with torch.no_grad(), prepared.attached("frozen"):
            simulated = model(x)
        return signal_to_noise(model(x), simulated)

    before = quality()
    smooth(prepared, [g for g in scaling_groups(prepared) if not g.from_float], calls)
    recalibrate(prepared, calls)
    assert quality() > before + 3
    converted = convert(prepared)
    assert check_agreement(prepared, converted, (x,), {}) > 40


def test_absorption_is_exact_where_the_constant_stays_below_the_activation() -> None:
    model = uneven(nn.ReLU)
    with torch.no_grad():
        model.layers[4].bias[:6] = 6.0
    calls = [((x,), {}) for x in images().split(4)]
    prepared = prepare(model, (images(4),), recipe="int8", observer="mse")
    calibrate(prepared, steps_of(prepared, [call[0] for call in calls]))
    absorbed = absorb(prepared, scaling_groups(prepared), calls)
    assert len(absorbed) == 2
    assert max(absorbed.values()) > 1
    x = torch.cat([call[0][0] for call in calls])
    assert bool((model.layers[:6](x).amin((0, 2, 3)) >= prepared.channels[":layers.5"].shift - 1e-5).all())
    torch.testing.assert_close(rescaled_function(prepared, x, float("inf")), model(x), atol=1e-5, rtol=1e-5)
    # Elsewhere a value below the constant is lost: that is what absorption costs on other inputs.
    other = 3 * images(64, seed=9)
    with torch.no_grad():
        error = (rescaled_function(prepared, other, float("inf")) - model(other)).abs().max()
        assert 1e-4 < float(error) < float(model(other).abs().max())


def test_padding_readers_and_links_rule_absorption_out() -> None:
    case = next(case for case in CASES if case.name == "depthwise")
    model = case.build()
    args, _ = case.call(4)
    prepared = prepare(model, args, recipe="int8", observer="mse")
    calls = [(case.call(4)[0], {}) for _ in range(3)]
    calibrate(prepared, steps_of(prepared, [call[0] for call in calls]))
    groups = scaling_groups(prepared)
    assert any(group.padded for group in groups)
    for group in absorb(prepared, groups, calls):
        assert not group.padded
        assert not group.links


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


def test_smoothing_factor_follows_the_paper() -> None:
    activation, weight = torch.tensor([16.0, 4.0, 0.0]), torch.tensor([1.0, 4.0, 1.0])
    # sqrt(16 / 1) = 4 and sqrt(4 / 4) = 1, over the largest; a dead channel stays.
    torch.testing.assert_close(smoothing_factor(activation, weight, 0.5), torch.tensor([1.0, 0.25, 1.0]))
    torch.testing.assert_close(smoothing_factor(activation, weight, 1.0), torch.tensor([1.0, 0.25, 1.0]))
