"""What accuracy algorithms change about a calibrated model, beside its module: layers and channel scales. Data only."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lightning_quant.numerics.fake_quantize import along


@dataclass(frozen=True)
class FoldedLayer:
    """A weighted operator with its BatchNorm folded in, in place of what the module holds.

    Attributes:
        weight: `(out_channels, in_channels // groups, ...)`, float32.
        bias: `(out_channels,)`, float32.
        scale: `(out_channels,)`, of the weight; None to choose it by the largest magnitudes.
        integers: the weight in whole steps of `scale`, float32; None to round to nearest.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    integers: Tensor | None = None

    def to(self, device: torch.device) -> "FoldedLayer":
        """Return the same on another device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


@dataclass(frozen=True)
class ChannelScale:
    """How the values of an edge map on its grid: `(x - shift) / factor`, channel by channel, is what gets rounded.

    The operators around the edge have taken factor and shift into their weights, so that the function stays.

    Attributes:
        factor: `(channels,)`, positive.
        shift: `(channels,)`, what absorption has moved into the next bias.
        axis: dimension of the channels.
        clip: upper bound that a clipping activation has set; the grid stays below it, and its end clips instead.
    """

    factor: Tensor
    shift: Tensor
    axis: int = 1
    clip: float = math.inf

    def to_grid(self, x: Tensor) -> Tensor:
        """Map values of the model to values of the grid."""
        return (x - self._shaped(self.shift, x)) / self._shaped(self.factor, x)

    def from_grid(self, x: Tensor) -> Tensor:
        """Map values of the grid to values of the model."""
        return x * self._shaped(self.factor, x) + self._shaped(self.shift, x)

    def to(self, device: torch.device) -> "ChannelScale":
        """Return the same on another device."""
        return replace(self, factor=self.factor.to(device), shift=self.shift.to(device))

    def _shaped(self, values: Tensor, x: Tensor) -> Tensor:
        return along(values.to(x), x, self.axis)


def unscaled(channels: int, axis: int) -> ChannelScale:
    """Return the channel scale that changes nothing."""
    return ChannelScale(torch.ones(channels, dtype=torch.float32), torch.zeros(channels, dtype=torch.float32), axis)


@dataclass(frozen=True)
class AccuracyStep:
    """One step for accuracy that calibration tried.

    Attributes:
        name: of the step.
        before_db: signal-to-noise ratio of the output before it, in decibels.
        after_db: the same after it.
        kept: whether the step was kept.
        changed: number of operators or tensors that it changed.
        seconds: how long it took.
        held_back: whether it was judged on calls that it was not fitted to.
    """

    name: str
    before_db: float
    after_db: float
    kept: bool
    changed: int
    seconds: float
    held_back: bool = True

    def __str__(self) -> str:
        verdict, data = "kept" if self.kept else "undone", "held-back calibration" if self.held_back else "calibration"
        return (
            f"{self.name}: {self.before_db:.1f} to {self.after_db:.1f} dB on {data} data, {verdict} "
            f"({self.changed} changed, {self.seconds:.0f} s)"
        )


def outcomes(steps: Iterable[AccuracyStep]) -> tuple[str, ...]:
    """Return a line for every step that changed the model, and one for all others together."""
    steps = tuple(steps)
    fruitless = [step for step in steps if not (step.kept and step.changed)]
    lines = [str(step) for step in steps if step not in fruitless]
    if len(fruitless) == 1:
        lines.append(str(fruitless[0]))
    elif fruitless:
        names = ", ".join(step.name for step in fruitless)
        lines.append(f"tried without a gain, and left out: {names} ({sum(step.seconds for step in fruitless):.0f} s)")
    return tuple(lines)
