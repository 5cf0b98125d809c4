"""Several processes that train one model: what they must agree on, and what only the first of them does."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import observe, settle
from lightning_quant.calls.calls import map_tensors
from lightning_quant.calls.recorded_calls import recorded_calls
from lightning_quant.errors import QuantizationError
from lightning_quant.numerics.bias_correction import InputMeans
from lightning_quant.ranges.observer_merge import merged
from lightning_quant.ranges.observers import Histogram
from lightning_quant.ranges.ranges import Ranges
from lightning_quant.simulate.prepared import Prepared

T = TypeVar("T")


class Group:
    """The processes of one fit; every method but `is_first` is a meeting that all of them must come to.

    Attributes:
        size: number of processes; with one, nothing is ever waited for.
        device: where tensors must lie to be reduced.
    """

    def __init__(self, size: int = 1, device: torch.device | None = None) -> None:
        self.size, self.device = size, device or torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.size == 1 or dist.get_rank() == 0

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function in every process; where it fails in one, all raise: the others would wait for it for ever.

        Raises:
            QuantizationError: the first failure among the others.
            Exception: whatever the function raises in this process.
        """
        result: Any = None
        error: Exception | None = None
        try:
            result = function(*args)
        except Exception as caught:
            error = caught
        # What others raise may not be made to travel.
        told = error if error is None or isinstance(error, QuantizationError) else QuantizationError(repr(error))
        others = [other for other in self.gather(told) if other is not None]
        if error is not None:
            raise error
        if others:
            raise others[0]
        return result

    def on_first(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function in the first process alone and return its result in all; where it fails, all raise."""
        result: Any = self.together(lambda: function(*args) if self.is_first else None)
        return self.share(result)

    def share(self, value: T) -> T:
        """Return the first process's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def share_tensors(self, module: nn.Module) -> None:
        """Overwrite buffers, which drift apart where each process sees data of its own, with the first process's."""
        if self.size > 1:
            for buffer in module.buffers():
                shared = buffer.detach().to(self.device)
                dist.broadcast(shared, src=0)
                buffer.data.copy_(shared)

    def maximum(self, tensor: Tensor) -> Tensor:
        """Return the elementwise maximum over all processes."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def total(self, tensor: Tensor) -> Tensor:
        """Return the elementwise sum over all processes."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the elementwise mean over all processes."""
        return self.total(tensor) / self.size

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return tensor
        reduced = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(reduced, operation)
        return reduced.to(tensor.device)


def merge_batch(group: Group, ranges: Ranges) -> None:
    """Let the extremes that all processes saw in one batch count as one update of every range.

    One reduction per batch, after it, of all tensors at once: processes may take different branches inside a batch.
    """
    # What is no number must not get lost in a comparison: it comes out as an infinite range, which is refused later.
    rows = ranges.take_seen(group.device).nan_to_num(torch.inf, torch.inf, -torch.inf)
    rows = group.maximum(rows)
    is_seen = rows[:, 1] > -torch.inf
    edges = [identity for identity, seen in zip(ranges.observers, is_seen.tolist(), strict=True) if seen]
    ranges.take_in(edges, -rows[is_seen, 0], rows[is_seen, 1])


def calibrate_together(group: Group, prepared: Prepared, steps: Callable[[], Iterable[Callable[[], Any]]]) -> None:
    """Calibrate on the data of all processes: the statistics are those of all of it together.

    Minima and maxima are exact. Histograms can be added where they divide the same span, so the data is read twice:
    once to find the span, once to count; and twice more where channels are aligned.

    Args:
        group: the processes, each with data of its own.
        prepared: as for `calibrate`.
        steps: returns the steps of this process, the same ones each time; there may be none.
    """
    from lightning_quant.calibrate.alignment import align_channels, alignable

    def again() -> None:
        prepared.ranges = prepared.ranges.anew(prepared.recipe, prepared.observer)
        _calibrate_once(group, prepared, steps)

    groups = alignable(prepared, group) if prepared.recipe.align_channels else []
    with recorded_calls(prepared.root, None if groups else 0) as calls:
        _calibrate_once(group, prepared, steps)
    aligned = align_channels(prepared, groups, calls, again, group) if groups else None
    prepared.accuracy_steps = () if aligned is None else (aligned,)


def _calibrate_once(group: Group, prepared: Prepared, steps: Callable[[], Iterable[Callable[[], Any]]]) -> None:
    ranges = prepared.ranges
    if any(isinstance(observer, Histogram) for observer in ranges.observers.values()):
        scout = prepared.bound_to(prepared.root)
        scout.ranges = Ranges(ranges.edges, prepared.recipe, "min_max")
        group.together(observe, scout, steps(), None)
        for observer, row in zip(ranges.observers.values(), _merged_extremes(group, scout.ranges), strict=True):
            if isinstance(observer, Histogram) and bool(row.isfinite().all()):
                observer.fix_span(-row[0], row[1])
    means = InputMeans() if prepared.recipe.bias_correction else None
    number = group.together(observe, prepared, steps(), means)
    _merge(group, ranges, means)
    settle(prepared, sum(group.gather(number)), means)


def _merge(group: Group, ranges: Ranges, means: InputMeans | None) -> None:
    observers = ranges.observers
    seen = {identity: observer for identity, observer in observers.items() if observer.num_updates}
    cpu = torch.device("cpu")
    parts = group.gather({i: map_tensors(lambda t: t.to(cpu), observer.state()) for i, observer in seen.items()})
    for identity, observer in observers.items():
        states = [part[identity] for part in parts if identity in part]
        if states:
            device = next((v.device for v in observer.state().values() if isinstance(v, Tensor)), group.device)
            observer.load_state(merged(observer, states))
            observer.to(device)
    ranges.forget_parameters()
    if means is not None:
        _merge_means(group, means)


def _merged_extremes(group: Group, ranges: Ranges) -> Tensor:
    """Return `(observers, 2)`: minus the minimum and the maximum that any process saw, or minus infinity."""
    observers = list(ranges.observers.values())
    device = next((o.low.device for o in observers if o.low is not None), group.device)
    nothing = torch.tensor(-torch.inf, dtype=torch.float32, device=device)
    rows = [torch.stack([nothing, nothing] if o.low is None or o.high is None else [-o.low, o.high]) for o in observers]
    return group.maximum(torch.stack(rows).nan_to_num(torch.inf, torch.inf, -torch.inf))


def _merge_means(group: Group, means: InputMeans) -> None:
    parts = group.gather((means.means, means.counts))
    means.means, means.counts = {}, {}
    for identity in dict.fromkeys(identity for _, counts in parts for identity in counts):
        counted = [(part[identity].cpu(), counts[identity]) for part, counts in parts if identity in counts]
        number = sum(count for _, count in counted)
        means.means[identity] = sum((mean * (count / number) for mean, count in counted), torch.zeros(()).double())
        means.counts[identity] = number
