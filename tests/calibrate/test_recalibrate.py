"""Calibrating again forgets what was learned before."""

import torch
from torch import Tensor, nn
from uneven_chains import Normalized

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.fit import restore, snapshot
from lightning_quant.calibrate.groups import scaling_groups
from lightning_quant.calibrate.recalibrate import recalibrate
from lightning_quant.calibrate.smoothing import smooth
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


def test_other_channel_scales_are_learned_from_the_same_run() -> None:
    torch.manual_seed(0)
    model = Normalized().eval()
    calls = [Call((part,)) for part in torch.randn(64, 32).split(16)]
    prepared = prepare(model, calls[0].args, observer="mse", trains=False)
    calibrate(prepared, steps_of(prepared, calls))
    (group,) = [group for group in scaling_groups(prepared) if group.normalized]
    ways = []
    for alpha in (0.35, 0.65, 0.95) * 2:
        way = prepared.bound_to(model)
        restore(way, snapshot(prepared))
        smooth(way, [group], calls, alpha=alpha)
        ways.append(way)
    runs = []
    with model.norm.register_forward_hook(lambda *_: runs.append(1)):
        recalibrate(ways[0], calls, ways[1:3])
    assert len(runs) == len(calls)
    for way in ways[3:]:
        recalibrate(way, calls)
    for together, alone in zip(ways[:3], ways[3:], strict=True):
        for identity in alone.ranges.edges:
            assert together.ranges.parameters(identity) == alone.ranges.parameters(identity)
        for identity, correction in alone.bias_corrections.items():
            assert torch.equal(together.bias_corrections[identity], correction)
    scales = [way.ranges.parameters(group.edges[0])[0].item() for way in ways[:3]]
    assert len(set(scales)) == 3


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
