"""What every observer is, and the two that look at nothing but each tensor's extremes."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import CalibrationError

# How the same state of several processes becomes one.
MERGES = ("min", "max", "sum", "same", "mean")


class Observer(ABC):
    """Collects statistics of one tensor; `low` and `high` are 0-dim float32 tensors once something was seen.

    Attributes:
        merge: name of every state to how those of several processes become one: "min", "max", "sum", "same" in all, or
            "mean", weighted by the number of updates. A class that updates states says so itself, since nobody else
            knows; one that does not is for a single process.
        needs_values: whether it looks at all values of a tensor; where extremes are enough, those of many tensors are
            taken in at once, and in training those of several processes.
    """

    merge: ClassVar[dict[str, str]] = {"num_updates": "sum"}
    needs_values: ClassVar[bool] = True

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.num_updates = 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take one tensor of any shape and float dtype into account; an empty tensor changes nothing."""
        if x.numel() == 0:
            return
        low, high = torch.aminmax(x.detach())
        self._update(x.detach(), low.float(), high.float())
        self.num_updates += 1

    @abstractmethod
    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None: ...

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the range to quantize, both 0-dim float32.

        Raises:
            CalibrationError: nothing was seen, or what was seen is not finite.
        """
        if self.low is None or self.high is None:
            raise CalibrationError("nothing was observed")
        return self.low, self.high

    def state(self) -> dict[str, Tensor | int]:
        """Return what `load_state` needs: tensors and ints only, safe for `torch.load(weights_only=True)`."""
        return {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
            if isinstance(value, Tensor | int)
        }

    def load_state(self, state: dict[str, Tensor | int]) -> None:
        """Load a saved state."""
        for name, value in state.items():
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)

    def to(self, device: torch.device) -> None:
        """Move the statistics to a device."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))


@dataclass(frozen=True)
class Ends:
    """The ends of several observers' ranges side by side.

    Attributes:
        lows: `(observers,)` float32.
        highs: likewise.
        views: the single ends, which the observers hold.
    """

    lows: Tensor
    highs: Tensor
    views: tuple[tuple[Tensor, Tensor], ...]

    def are_of(self, observers: Collection[Observer]) -> bool:
        """Tell whether these are the ends of all these observers, in this order, to this day."""
        return len(observers) == len(self.views) and all(
            observer.low is low and observer.high is high
            for observer, (low, high) in zip(observers, self.views, strict=True)
        )


class Extremes(Observer):
    """An observer that the extremes of a tensor are enough for."""

    needs_values: ClassVar[bool] = False

    @classmethod
    @torch.no_grad()
    def update_all(cls, observers: "Sequence[Extremes]", lows: Tensor, highs: Tensor, ends: Ends | None = None) -> Ends:
        """Let the extremes of one tensor for each observer count as an update, in one operation for all of them.

        Args:
            observers: all of this class.
            lows: `(observers,)`, any float dtype.
            highs: likewise.
            ends: what the last update returned, which saves putting the old ends side by side where they still are.
        """
        lows, highs = lows.float(), highs.float()
        if ends is not None and ends.are_of(observers):
            old = ends.lows, ends.highs
        else:
            old = cls._side_by_side(observers, lows, highs)
        lows, highs = cls._combine(observers, old, (lows, highs))
        ends = Ends(lows, highs, tuple(zip(lows.unbind(), highs.unbind(), strict=True)))
        for observer, (low, high) in zip(observers, ends.views, strict=True):
            observer.low, observer.high = low, high
            observer.num_updates += 1
        return ends

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        new = low.view(1), high.view(1)
        lows, highs = self._combine([self], self._side_by_side([self], *new), new)
        self.low, self.high = lows[0], highs[0]

    @staticmethod
    def _side_by_side(observers: "Sequence[Extremes]", lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        # What has no range yet takes that of its first batch.
        old = [(low, high) if o.low is None or o.high is None else (o.low, o.high)
               for o, low, high in zip(observers, lows.unbind(), highs.unbind(), strict=True)]  # fmt: skip
        old_lows, old_highs = (torch.stack(ends) for ends in zip(*old, strict=True))
        return old_lows, old_highs

    @classmethod
    @abstractmethod
    def _combine(
        cls, observers: "Sequence[Extremes]", old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]: ...


class MinMax(Extremes):
    """The lowest and the highest value ever seen."""

    merge: ClassVar[dict[str, str]] = {"low": "min", "high": "max", "num_updates": "sum"}

    @classmethod
    def _combine(
        cls, observers: Sequence[Extremes], old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])


class MovingAverage(Extremes):
    """Exponential average of each batch's extremes, for training, where weights move.

    The weight of a new batch is `max(momentum, 1 / number of batches)`: a plain mean at first, so that the first batch
    does not dominate. A smaller momentum lags behind activations that grow while a network learns, and clips them.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.1 (the moving average).
    """

    merge: ClassVar[dict[str, str]] = {"low": "mean", "high": "mean", "num_updates": "sum"}

    def __init__(self, momentum: float = 0.05) -> None:
        super().__init__()
        self.momentum = momentum

    @classmethod
    def _combine(
        cls, observers: Sequence[Extremes], old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        weights = [max(o.momentum, 1 / (o.num_updates + 1)) for o in observers if isinstance(o, MovingAverage)]
        # A number costs no copy to the device, and tensors of a model have mostly seen as many batches.
        weight = weights[0] if len(set(weights)) == 1 else old[0].new_tensor(weights)
        return torch.lerp(old[0], new[0], weight), torch.lerp(old[1], new[1], weight)
