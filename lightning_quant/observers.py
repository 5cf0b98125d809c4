"""Ranges from data: each observer sees tensors and answers with the range `(low, high)` to quantize.

A new observer is one class here. Every observer keeps a fixed amount of memory whatever it has seen, in plain tensors
that move with `to` and are saved by `state`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.choice import check_choice
from lightning_quant.errors import CalibrationError, QuantizationError
from lightning_quant.recipe import Recipe


class Observer(ABC):
    """Collects statistics of one tensor; `low` and `high` are 0-dim float32 tensors once something was seen."""

    # Whether it looks at all values of a tensor; where extremes are enough, those of many tensors are taken in at once.
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
        """Take over a saved state."""
        for name, value in state.items():
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)

    def to(self, device: torch.device) -> None:
        """Move the statistics to a device."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))


class Extremes(Observer):
    """An observer that the extremes of a tensor are enough for."""

    needs_values: ClassVar[bool] = False

    @classmethod
    @torch.no_grad()
    def update_all(cls, observers: "Sequence[Extremes]", lows: Tensor, highs: Tensor) -> None:
        """Let the extremes of one tensor for each observer count as an update, in one operation for all of them.

        Args:
            observers: all of this class.
            lows: `(observers,)`, any float dtype.
            highs: likewise.
        """
        for observer, low, high in zip(observers, *cls._ends(observers, lows, highs), strict=True):
            observer.low, observer.high = low, high
            observer.num_updates += 1

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        ((self.low,), (self.high,)) = self._ends([self], low.view(1), high.view(1))

    @classmethod
    def _ends(
        cls, observers: "Sequence[Extremes]", lows: Tensor, highs: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the new low and high of each observer, 0-dim."""
        lows, highs = lows.float(), highs.float()
        # What has no range yet takes that of its first batch.
        old = [(low, high) if o.low is None or o.high is None else (o.low, o.high)
               for o, low, high in zip(observers, lows.unbind(), highs.unbind(), strict=True)]  # fmt: skip
        old_lows, old_highs = (torch.stack(ends) for ends in zip(*old, strict=True))
        lows, highs = cls._combine(observers, (old_lows, old_highs), (lows, highs))
        return lows.unbind(), highs.unbind()

    @classmethod
    @abstractmethod
    def _combine(
        cls, observers: "Sequence[Extremes]", old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]: ...


class MinMax(Extremes):
    """The lowest and the highest value ever seen."""

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


class Histogram(MinMax):
    """A streaming histogram of `NUM_BINS` bins whose span doubles when data falls outside; counts are never lost.

    Doubling merges neighbouring bins pairwise, so a bin keeps its exact count and the memory stays fixed.
    """

    needs_values: ClassVar[bool] = True
    NUM_BINS = 2048
    NUM_CANDIDATES = 100

    def __init__(self) -> None:
        super().__init__()
        self.counts = torch.zeros(self.NUM_BINS, dtype=torch.float64)
        # Wider than float32, in which a narrow span around a large value would have no width.
        self.span_low = self.span_high = torch.tensor(0.0, dtype=torch.float64)

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        if not torch.isfinite(low + high):
            raise CalibrationError("non-finite values")
        super()._update(x, low, high)
        low, high = low.double(), high.double()
        if self.span_low == self.span_high:
            self.fix_span(low, high)
        while low < self.span_low:
            self._double(to_the_left=True)
        while high > self.span_high:
            self._double(to_the_left=False)
        self.counts += self._bin_counts(x)

    def fix_span(self, low: Tensor, high: Tensor) -> None:
        """Choose the span that the bins divide; both ends are 0-dim. Later data may still double it."""
        low, high = low.double(), high.double()
        self.span_low = low
        self.span_high = high + (1e-6 * torch.maximum(low.abs(), high.abs()) + 1e-30)
        self.counts = self.counts.to(low.device)

    def percentile_range(self, percentile: float) -> tuple[Tensor, Tensor]:
        """Return the range that leaves out an equal share of values on both sides, never wider than the data."""
        low, high = MinMax.range(self)
        cumulative = self.counts.cumsum(0) / self.counts.sum()
        tail = (1 - percentile / 100) / 2
        edges = self._edges()
        last = self.NUM_BINS - 1
        first_kept = int(torch.searchsorted(cumulative, tail, right=True).clamp(max=last))
        last_kept = int(torch.searchsorted(cumulative, 1 - tail).clamp(max=last))
        return torch.maximum(low, edges[first_kept].float()), torch.minimum(high, edges[last_kept + 1].float())

    def least_error_range(self, num_levels: int) -> tuple[Tensor, Tensor]:
        """Return the range with the least expected squared rounding and clipping error under the histogram.

        Both ends are shrunk on a grid of `NUM_CANDIDATES` steps, one after the other, until neither improves.
        Source: Choukroun et al. 2019, arXiv:1902.06822, equation 2 (minimal MSE), here by search over a histogram.
        """
        low, high = (end.double() for end in MinMax.range(self))
        low, high = low.clamp(max=0), high.clamp(min=0)
        edges = self._edges()
        centres = ((edges[:-1] + edges[1:]) / 2).clamp(low, high)
        occupied = self.counts > 0
        centres, weights = centres[occupied], self.counts[occupied]
        shrink = torch.linspace(0.02, 1, self.NUM_CANDIDATES, dtype=torch.float64, device=low.device)
        best_low, best_high = low, high
        for _ in range(3):
            highs, lows = high * shrink, low * shrink
            best_high = highs[_least_error(centres, weights, best_low.expand_as(shrink), highs, num_levels)]
            best_low = lows[_least_error(centres, weights, lows, best_high.expand_as(shrink), num_levels)]
            if low == 0 or high == 0:
                break
        return best_low.float(), best_high.float()

    def _bin_counts(self, x: Tensor) -> Tensor:
        x = x.flatten()
        if x.device.type == "cpu":
            return torch.histc(x.double(), self.NUM_BINS, self.span_low.item(), self.span_high.item())
        index = ((x - self.span_low) / (self.span_high - self.span_low) * self.NUM_BINS).long()
        return torch.bincount(index.clamp_(0, self.NUM_BINS - 1), minlength=self.NUM_BINS).double()

    def _double(self, *, to_the_left: bool) -> None:
        merged = self.counts.view(-1, 2).sum(1)
        empty = torch.zeros_like(merged)
        width = self.span_high - self.span_low
        if to_the_left:
            self.span_low = self.span_low - width
            self.counts = torch.cat([empty, merged])
        else:
            self.span_high = self.span_high + width
            self.counts = torch.cat([merged, empty])

    def _edges(self) -> Tensor:
        steps = torch.arange(self.NUM_BINS + 1, dtype=torch.float64, device=self.counts.device) / self.NUM_BINS
        return self.span_low + steps * (self.span_high - self.span_low)


def _least_error(centres: Tensor, weights: Tensor, lows: Tensor, highs: Tensor, num_levels: int) -> int:
    """Return the index of the candidate range with the least squared error over weighted values."""
    scale = ((highs - lows) / (num_levels - 1)).clamp(min=1e-30).unsqueeze(1)
    zero_point = torch.round(-lows.unsqueeze(1) / scale)
    quantized = torch.clamp(torch.round(centres / scale) + zero_point, 0, num_levels - 1)
    error = ((quantized - zero_point) * scale - centres).square() @ weights
    return int(error.argmin())


class Percentile(Histogram):
    """The range that leaves out an equal share of extreme values on both sides.

    Args:
        percentile: share of all values kept inside, in percent, in (50, 100]. Zero always stays inside.
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        if not 50 < percentile <= 100:
            raise QuantizationError(f"Expected `percentile` to be in (50, 100], but got {percentile}.")
        self.percentile = percentile

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the percentile range, never wider than the data."""
        return self.percentile_range(self.percentile)


class MeanSquaredError(Histogram):
    """The range with the least expected squared rounding and clipping error; see `Histogram.least_error_range`."""

    def __init__(self, num_levels: int = 256) -> None:
        super().__init__()
        self.num_levels = num_levels

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the range of least expected squared error, never wider than the data."""
        return self.least_error_range(self.num_levels)


OBSERVERS: dict[str, Callable[[Recipe], Observer]] = {
    "min_max": lambda recipe: MinMax(),
    "moving_average": lambda recipe: MovingAverage(),
    "percentile": lambda recipe: Percentile(recipe.percentile),
    "mse": lambda recipe: MeanSquaredError(recipe.activation.quant_max + 1),
}


def build(name: str, recipe: Recipe) -> Observer:
    """Return a fresh observer of that name with the recipe's settings.

    Raises:
        QuantizationError: the name is unknown.
    """
    check_choice("observer", name, OBSERVERS)
    return OBSERVERS[name](recipe)
