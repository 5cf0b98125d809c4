"""A sample of what tensors hold over all calls in the float model, which scaling of channels does not change.

So a run that learns ranges can show it, and no other is needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.calibrate.groups import ScalingGroup
from lightning_quant.calls.calls import Call
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode

_NUM_ROWS = 512


@dataclass(frozen=True)
class Sample:
    """What a tensor holds over all calls.

    Attributes:
        axis: dimension of its channels.
        rows: `(rows, channels)`, some of its places.
        low: `(channels,)`, least values of all places.
        high: `(channels,)`, highest values.
    """

    axis: int
    rows: Tensor
    low: Tensor
    high: Tensor

    def joined(self, other: "Sample") -> "Sample":
        """Return the sample of two calls."""
        rows = torch.cat([self.rows, other.rows])
        return Sample(self.axis, rows, torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def on_grid(self, prepared: Prepared, edge: str) -> "Sample":
        """Return the sample on the present grid of its edge, which keeps the order of values."""
        taken = torch.cat([self.rows, self.low.unsqueeze(0), self.high.unsqueeze(0)])
        places = taken.view(len(taken), *[1] * (self.axis - 1), taken.shape[1]).movedim(-1, self.axis)
        on_grid = prepared.on_grid(edge, places, clipped=True).movedim(self.axis, -1).view_as(taken)
        return Sample(self.axis, on_grid[:-2], on_grid[-2], on_grid[-1])


@contextmanager
def sampling(prepared: Prepared, groups: list[ScalingGroup], num_calls: int) -> Iterator[dict[str, Sample]]:
    """Sample every edge of the groups that the float model reaches while a block runs it.

    Args:
        prepared: whose module runs.
        groups: from `scaling_groups`.
        num_calls: that the block makes; places are evenly spaced in each.
    """
    owners = {edge: group for group in groups for edge in group.edges}
    number = -(-_NUM_ROWS // num_calls)
    seen: dict[str, Sample] = {}

    def watch(edge: str, x: Tensor) -> None:
        if edge not in owners or not x.numel():
            return
        group = owners[edge]
        rows = x.float().movedim(group.axis, -1).reshape(-1, group.channels)
        chosen = rows[:: max(1, len(rows) // number)][:number].clone()
        new = Sample(group.axis, chosen, rows.amin(0), rows.amax(0))
        seen[edge] = seen[edge].joined(new) if edge in seen else new

    with prepared.simulation.watching(watch):
        yield seen


def sample_edges(prepared: Prepared, groups: list[ScalingGroup], calls: list[Call]) -> dict[str, Sample]:
    """Return a sample of every edge of the groups that the float model reaches in some calls of the module."""
    with (
        evaluation_mode(prepared.root),
        sampling(prepared, groups, len(calls)) as seen,
        prepared.attached("off"),
    ):
        for args, kwargs in calls:
            prepared.root(*args, **kwargs)
    return seen
