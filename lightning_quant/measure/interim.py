"""Interim looks at a validation, which ends once an interval on what was seen by then decides.

Looks are after an eighth, a quarter and a half of the data, as is fixed beforehand. Batches come in a random order,
since data are often sorted, so that those that were seen are a random sample of all. That an order makes no difference
to what each batch adds is checked on the float model first.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_quant.measure.contributions import MIN_BLOCKS, Contributions, Difference, Metrics, differences

SHARES = (0.125, 0.25, 0.5)
"""Of the data, behind each of which is a look."""
Decides = Callable[[Mapping[str, Difference]], bool]
_MIN_BATCHES = 20
# By how much, of itself, what a batch adds to a metric may differ with its place.
_TOLERANCE = 1e-4


class PartialMetrics(Metrics):
    """What a validation that was cut short had logged.

    Attributes:
        share: of the data that was seen.
        floating: metrics of the float model on the same.
    """

    def __init__(self, parts: dict[str, Contributions], floating: Metrics, share: float) -> None:
        super().__init__({name: one.of(range(one.number)) for name, one in parts.items()}, contributions=parts)
        self.floating, self.share = floating, share


class Interim:
    """Looks at one validation.

    Args:
        floating: metrics of the float model on all data.
        decides: whether differences from them, on what was seen by then, are enough.
        order: of the batches or samples, by their places in the data.

    Attributes:
        metrics: of a validation that was cut short; None for as long as nothing is decided.
    """

    def __init__(self, floating: Metrics, decides: Decides, order: Sequence[int]) -> None:
        self.floating, self.decides, self.order = floating, decides, order
        self.metrics: PartialMetrics | None = None
        number = len(order)
        points = {max(MIN_BLOCKS, math.ceil(share * number)) for share in SHARES}
        self._points = sorted(point for point in points if point < number)

    def look(self, number: int, parts: Callable[[], Mapping[str, Contributions]]) -> bool:
        """Decide, where that is due, on what was seen by now; return whether validation may end.

        Args:
            number: of batches or samples by now.
            parts: gives what each of them has added, by metric.
        """
        passed = [point for point in self._points if point <= number]
        self._points = self._points[len(passed) :]
        if not passed or number >= len(self.order) or self.metrics is not None:
            return self.metrics is not None
        known = self.floating.contributions
        seen = {name: one for name, one in parts().items() if one.number == number and name in known}
        part = {name: known[name].ordered(self.order[:number]) for name in seen}
        floating = Metrics({name: one.of(range(number)) for name, one in part.items()}, contributions=part)
        metrics = PartialMetrics(seen, floating, number / len(self.order))
        if self.decides(differences(metrics, floating)):
            self.metrics = metrics
        return self.metrics is not None

    def outcome(self, metrics: Metrics) -> Metrics:
        """Return metrics of all data with what each batch adds in the data's own order, or those of the part alone."""
        if self.metrics is not None:
            return self.metrics
        own = [place for place, _ in sorted(enumerate(self.order), key=lambda item: item[1])]
        parts = {n: p.ordered(own) for n, p in metrics.contributions.items() if p.number == len(own)}
        return Metrics(metrics, metrics.higher_is_better, draws=metrics.draws, contributions=parts)

    def loader(self, loaders: Any) -> DataLoader:
        """Return the loader with its batches in this order, which ends once something is decided."""
        own: Any = only_loader(loaders)
        # A copy of its own: workers that go on are the other's, and know its order.
        probe = object.__new__(type(own))
        probe.__dict__.update(own.__dict__, batch_sampler=_InOrder(own.batch_sampler, self), _iterator=None)
        return probe

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Let pass what the end of a validation raises that was cut short."""
        try:
            yield
        except Exception:
            if self.metrics is None:
                raise


class _InOrder:
    """A batch sampler that gives the batches of another one in the order of a validation with looks."""

    def __init__(self, batches: Any, interim: Interim) -> None:
        self.batches, self.interim = batches, interim

    def __iter__(self) -> Iterator[Any]:
        every = list(self.batches)
        for place in self.interim.order:
            if self.interim.metrics is not None:
                return
            yield every[place]

    def __len__(self) -> int:
        # As many as ever, since a Trainer's limits may be shares of them.
        return len(self.batches)


def only_loader(loaders: Any) -> DataLoader | None:
    """Return the one loader whose batches can come in another order; None where that cannot be."""
    if isinstance(loaders, list | tuple) and len(loaders) == 1:
        loaders = loaders[0]
    plain = isinstance(loaders, DataLoader) and type(loaders).__iter__ is DataLoader.__iter__
    if not plain or type(loaders.sampler) is not SequentialSampler or type(loaders.batch_sampler) is not BatchSampler:
        return None
    return loaders


def random_order(loaders: Any, floating: Metrics, names: Sequence[str]) -> list[int]:
    """Return a random order of the batches of validation; none where it cannot be cut short.

    Args:
        loaders: of validation.
        floating: metrics of the float model on all data.
        names: metrics that decide.
    """
    loader = only_loader(loaders)
    numbers = {floating.contributions[name].number for name in names if name in floating.contributions}
    whole = len(numbers) == 1 and all(name in floating.contributions for name in names)
    if loader is None or not whole or floating.draws:
        return []
    (number,) = numbers
    # Of fewer the first look, which the check of the order takes as well, is at more than it spares.
    if not _MIN_BATCHES <= number <= len(loader.batch_sampler):  # type: ignore[arg-type]
        return []
    return random.Random(0).sample(range(number), number)


def is_indifferent(floating: Metrics, part: Metrics, order: Sequence[int], names: Sequence[str]) -> bool:
    """Tell whether the batches of a part add to metrics in this order what they add in the data's own."""
    for name in names:
        whole, seen = floating.contributions.get(name), part.contributions.get(name)
        if whole is None or seen is None:
            return False
        for place in range(seen.number):
            before, now = whole.of([order[place]]), seen.of([place])
            both = math.isnan(before) and math.isnan(now)
            if not both and not math.isclose(before, now, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE**2):
                return False
    return True
