"""Weights on both sides of a tensor get equal ranges."""

import torch
from torch import nn
from uneven_chains import prepared_chain

from lightning_quant.calibrate.equalization import equalize, equalizing_factor
from lightning_quant.calibrate.groups import scaling_groups
from lightning_quant.calibrate.recalibrate import recalibrate
from lightning_quant.calibrate.smoothing import column_maximum


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
