"""What rounding would cost a layer as it is now, from its own weight and what it reads: for a look while training.

Signal-to-noise of a whole tensor says little here: an outlier is most of the signal. So noise is compared with the
median channel, which is what an outlier takes the steps from.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from lightning_quant.capture.capture import isolated_rng
from lightning_quant.surgery.routing import evaluation_mode

# The median of the squares of normally distributed values over their mean.
_MEDIAN_SQUARE = 0.4549
_SMALLEST = 1e-30
# Values of a weight whose integers are followed.
_FOLLOWED = 1 << 14


@dataclass(frozen=True)
class Numbers:
    """How a tensor lies on its grid.

    Attributes:
        db: signal-to-noise ratio of the median channel, in decibels, with uniform noise of the grid's step.
        spread: how many times as far as the median channel the widest one reaches.
        channel: the widest one.
        kurtosis: fourth moment over the squared second, 3 for a normal distribution and 1.8 for a uniform one.
        low: lowest value.
        high: highest value.
    """

    db: float
    spread: float
    channel: int
    kurtosis: float
    low: float
    high: float


@torch.no_grad()
def weight_numbers(weight: Tensor, axis: int = 0, bits: int = 8) -> Numbers:
    """Look at a weight that is rounded symmetrically, with a scale for each output channel.

    Args:
        weight: of any shape.
        axis: of the output channels.
        bits: of the grid.
    """
    rows = weight.detach().float().movedim(axis, 0).flatten(1)
    reach = rows.abs().amax(1)
    squares = rows.square()
    middle = torch.where(squares > 0, squares, torch.nan).nanmedian(1).values / _MEDIAN_SQUARE
    noise = (reach / (2 ** (bits - 1) - 1)).square() / 12
    return _numbers(reach, middle[reach > 0], noise[reach > 0], rows)


@torch.no_grad()
def input_numbers(x: Tensor, axis: int, bits: int = 8) -> Numbers:
    """Look at what a layer reads, which is rounded with one scale between its lowest and highest value.

    Args:
        x: of any shape, finite.
        axis: of the channels.
        bits: of the grid.
    """
    rows = x.detach().float().movedim(axis, 0).flatten(1)
    reach, power = rows.abs().amax(1), rows.square().mean(1)
    step = (rows.amax().clamp(min=0) - rows.amin().clamp(max=0)) / (2**bits - 1)
    alive = power[reach > 0]
    return _numbers(reach, alive.median().view(1) if len(alive) else alive, step.square().view(1) / 12, rows)


@torch.no_grad()
def first_integers(weight: Tensor, axis: int = 0, bits: int = 8) -> Tensor:
    """Return the integers of a weight's first output channels, of 2^14 values or one channel.

    Args:
        weight: of any shape.
        axis: of the output channels.
        bits: of the grid, symmetric and with a scale for each of them.
    """
    rows = weight.detach().float().movedim(axis, 0).flatten(1)
    rows = rows[: max(1, _FOLLOWED // rows.shape[1])]
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return torch.round(rows / scale)


def worst_of(calls: list[Numbers]) -> Numbers:
    """Return the numbers of several tensors as if of one: the worst of each, over the range of all."""
    widest = max(calls, key=lambda numbers: numbers.spread)
    low, high = min(numbers.low for numbers in calls), max(numbers.high for numbers in calls)
    return replace(widest, db=min(numbers.db for numbers in calls), low=low, high=high)


def clipped_share(x: Tensor, low: float, high: float) -> float:
    """Return which share of values lies outside a range, in [0, 1]."""
    return float(((x < low) | (x > high)).float().mean())


def weight_of(layer: Any) -> Tensor:
    """Return a weight as evaluation has it: some parametrizations change, or draw, at every look in training."""
    own = layer._parameters.get("weight")
    if own is not None:
        return cast(Tensor, own)
    with torch.no_grad(), isolated_rng(), evaluation_mode(layer):
        return cast(Tensor, layer.weight)


def _numbers(reach: Tensor, signal: Tensor, noise: Tensor, rows: Tensor) -> Numbers:
    alive = reach[reach > 0]
    if not len(alive):
        return Numbers(torch.inf, 1.0, 0, 0.0, 0.0, 0.0)
    ratio = (signal / noise.clamp(min=_SMALLEST)).clamp(min=_SMALLEST)
    centred = rows - rows.mean()
    second = centred.square().mean().clamp(min=_SMALLEST)
    return Numbers(
        db=float(10 * torch.log10(ratio).median()),
        spread=float(alive.max() / alive.median()),
        channel=int(reach.argmax()),
        kurtosis=float(centred.pow(4).mean() / second.square()),
        low=float(rows.amin()),
        high=float(rows.amax()),
    )
