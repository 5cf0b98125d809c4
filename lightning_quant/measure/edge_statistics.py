"""What passes through each quantized tensor, as a whole and channel by channel: for diagnosis."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.calls.calls import Call
from lightning_quant.simulate.prepared import Prepared


@dataclass
class EdgeStatistics:
    """Statistics of a tensor on its grid's scale, in float.

    Attributes:
        low: `(channels,)`, least value of each channel.
        high: `(channels,)`, greatest value of each channel.
        total: `(channels,)`, float64 sum of each channel's values.
        number: of values.
        power: sum of squares.
        noise: sum of squared errors that rounding and clipping to the grid make.
        outside: number of values beyond the range.
    """

    low: Tensor
    high: Tensor
    total: Tensor
    number: int = 0
    power: float = 0.0
    noise: float = 0.0
    outside: int = 0

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, `(channels,)`."""
        return self.total / (max(1, self.number) / len(self.total))

    @property
    def spread(self) -> float:
        """The widest channel's largest magnitude over that of the median channel."""
        return ratio_to_median(torch.maximum(self.high.abs(), self.low.abs()))


def ratio_to_median(reach: Tensor) -> float:
    """Return the largest of the channels' magnitudes over the median one, of those that are not zero; 1 without any."""
    alive = reach[reach > 0]
    return float(alive.max() / alive.median()) if len(alive) else 1.0


@torch.no_grad()
def edge_statistics(prepared: Prepared, calls: list[Call]) -> dict[str, EdgeStatistics]:
    """Run calls in float and return the statistics of every edge that they reach.

    Args:
        prepared: detached and calibrated, its module in eval mode.
        calls: of the module.
    """
    axes = _channel_axes(prepared)
    statistics: dict[str, EdgeStatistics] = {}

    def count(identity: str, x: Tensor) -> None:
        grid, (scale, zero_point) = prepared.ranges.grid_of(identity), prepared.ranges.parameters(identity)
        values = prepared.on_grid(identity, x).float()
        if not values.numel() or not values.dim():
            return
        channels = values.movedim(axes.get(identity, 1 if x.dim() == 4 else -1), 0).flatten(1)
        low, high = channels.aminmax(dim=1)
        nothing = torch.zeros(len(low), dtype=torch.float64, device=low.device)
        entry = statistics.setdefault(identity, EdgeStatistics(low, high, nothing))
        entry.low, entry.high = torch.minimum(entry.low, low), torch.maximum(entry.high, high)
        entry.total += channels.double().sum(1)
        entry.number += values.numel()
        integers = torch.round(values / scale)
        rounded = integers.clamp(grid.low - zero_point, grid.high - zero_point)
        entry.power += float(values.square().sum())
        entry.noise += float((rounded * scale - values).square().sum())
        entry.outside += int((integers != rounded).sum())

    with prepared.simulation.watching(count), prepared.attached("observe"):
        for args, kwargs in calls:
            prepared.root(*args, **kwargs)
    return statistics


def _channel_axes(prepared: Prepared) -> dict[str, int]:
    """Return edge to the dimension of its channels, for those that weighted operators write or read."""
    axes: dict[str, int] = {}
    for operator in prepared.operators.values():
        if operator.weight:
            axis = -1 if operator.kind == "linear" else 1
            axes |= {operator.reads[0]: axis, operator.writes: axis}
    return axes
