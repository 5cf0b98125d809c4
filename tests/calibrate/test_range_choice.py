"""Ranges are chosen by what they cost behind the weights."""

import torch
from torch import nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.range_choice import choose_ranges
from lightning_quant.export.prepare import prepare


def test_ranges_are_chosen_behind_the_weights_that_read_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # A rare large value that the second layer does not read may be clipped, whatever it costs the tensor itself.
        model[0].weight[0], model[0].bias[0] = 0, 0
        model[0].weight[0, 0] = 1.0
        model[2].weight[:, 0] = 0.0
    x[0, 0] = 60.0
    prepared = prepare(model, (x[:32],), recipe="int8", observer="mse")
    calls = [((part,), {}) for part in x.split(64)]
    calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
    assert float(prepared.ranges.observers[":1"].range()[1]) > 50
    assert choose_ranges(prepared, calls) >= 1
    scale, zero_point = prepared.ranges.parameters(":1")
    assert float((255 - zero_point) * scale) < 20
