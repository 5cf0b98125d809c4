"""What a channel never falls below moves into the next bias."""

import torch
from models import CASES
from torch import nn
from uneven_chains import images, rescaled_function, uneven

from lightning_quant.calibrate.absorption import absorb, center_channels
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.fit import output_snr
from lightning_quant.calibrate.groups import scaling_groups
from lightning_quant.calibrate.recalibrate import recalibrate
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.export.prepare import prepare
from lightning_quant.recipe.recipe import Recipe


def test_absorption_is_exact_where_the_constant_stays_below_the_activation() -> None:
    model = uneven(nn.ReLU)
    with torch.no_grad():
        model.layers[4].bias[:6] = 6.0
    calls = [((x,), {}) for x in images().split(4)]
    prepared = prepare(model, (images(4),), recipe=Recipe(align_channels=False), observer="mse")
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
    prepared = prepare(model, args, recipe=Recipe(align_channels=False), observer="mse")
    calls = [(case.call(4)[0], {}) for _ in range(3)]
    calibrate(prepared, steps_of(prepared, [call[0] for call in calls]))
    groups = scaling_groups(prepared)
    assert any(group.padded for group in groups)
    for group in absorb(prepared, groups, calls):
        assert not group.padded
        assert not group.links


def _bottleneck(*activation: nn.Module) -> nn.Module:
    """Return a net of which the channels between two layers lie far apart, and vary little."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), *activation, nn.Conv2d(6, 8, 1), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-9.0, 9, -5, 5, 7, -7]))
    return model


def test_channels_that_lie_apart_are_centered_and_export() -> None:
    model = _bottleneck()
    calls = [((x,), {}) for x in images(32).split(8)]
    prepared = prepare(model, (images(8),), recipe=Recipe(align_channels=False), observer="mse")
    calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
    x = images(32, seed=7)
    before = output_snr(prepared, [((x,), {})])
    assert center_channels(prepared, scaling_groups(prepared), calls) == 1
    recalibrate(prepared, calls)
    assert output_snr(prepared, [((x,), {})]) > before + 3
    assert check_agreement(prepared, convert(prepared), (x,), {}) > 40


def test_what_pads_or_clips_or_is_read_in_float_is_not_centered() -> None:
    padded = _bottleneck()
    padded[1] = nn.Conv2d(6, 8, 3, padding=1)
    for model in (padded, _bottleneck(nn.ReLU()), _bottleneck(nn.Tanh())):
        calls = [((x,), {}) for x in images(16).split(8)]
        prepared = prepare(model, (images(8),), recipe=Recipe(align_channels=False), observer="mse")
        calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
        assert center_channels(prepared, scaling_groups(prepared), calls) == 0
        assert not prepared.channels
