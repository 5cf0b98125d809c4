"""Calibrating again forgets what was learned before."""

import torch
from torch import Tensor, nn

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


def test_tensors_at_the_ends_of_a_four_bit_network_keep_eight_bits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.rand(64, 6)
    prepared = prepare(model, (x,), recipe="int4", trains=False)
    calibrate(prepared, steps_of(prepared, list(x.split(16))))
    before = {identity: prepared.ranges.grid_of(identity).high for identity in prepared.ranges.edges}
    assert set(before.values()) == {15, 255}
    recalibrate(prepared, [Call((part,)) for part in x.split(16)])
    assert {identity: prepared.ranges.grid_of(identity).high for identity in before} == before


class Either(nn.Module):
    """Goes one of two ways, by the sign of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) if float(x.sum()) > 0 else self.down(x)


def test_steps_for_accuracy_meet_ways_that_few_calls_go() -> None:
    model, x = Either().eval(), torch.rand(8, 6)
    prepared = prepare(model, (x,), recipe="int8_accurate", observer="mse", trains=False)
    assert set(prepared.ranges.edges) == {"up:input", "up:1"}

    # The ladder parts the calls into two halves: one of them never goes up.
    calibrate(prepared, steps_of(prepared, [x, -x, 2 * x, -2 * x]))

    assert prepared.accuracy_steps
    assert prepared.ranges.parameters("up:input")[0] > 0
