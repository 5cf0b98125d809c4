"""What a channel never falls below moves into the next bias."""

import torch
from models import CASES
from torch import nn
from uneven_chains import images, rescaled_function, uneven

from lightning_quant.calibrate.absorption import absorb
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.groups import scaling_groups
from lightning_quant.export.prepare import prepare


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
