"""Calibrating again forgets what was learned before."""

import torch
from torch import nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.recalibrate import recalibrate
from lightning_quant.calls.calls import Call
from lightning_quant.export.prepare import prepare


def test_ranges_and_corrections_are_those_of_the_new_calls_alone() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.rand(64, 6)
    wide, narrow = (prepare(model, (x,), observer="min_max") for _ in range(2))
    calibrate(wide, steps_of(wide, [100 * x]))
    calibrate(narrow, steps_of(narrow, list(x.split(16))))
    assert wide.ranges.parameters(":input")[0] > 50 * narrow.ranges.parameters(":input")[0]

    recalibrate(wide, [Call((part,)) for part in x.split(16)])

    for identity in narrow.ranges.edges:
        assert wide.ranges.parameters(identity) == narrow.ranges.parameters(identity)
    assert wide.bias_corrections
    for identity, correction in narrow.bias_corrections.items():
        torch.testing.assert_close(wide.bias_corrections[identity], correction)
