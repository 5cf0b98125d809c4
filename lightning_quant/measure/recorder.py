"""What each batch adds to the metrics of a validation loop, read from running sums and states as it goes."""

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torchmetrics import Metric

from lightning_quant.measure.contributions import Contributions, of_means

# Share by which a metric put together from its parts may be off the logged one.
_TOLERANCE = 1e-4
# What the states of one metric may take, of all batches.
_MAX_BYTES = 64 * 2**20
# Counts of a metric that are moved one by one, at most.
_MOST_CELLS = 4096
# Classes, or outputs, by which samples are answered otherwise one by one, the rarest first; at most.
_MOST_KINDS = 8
# What metrics raise that are not defined on some of the data.
_UNDEFINED = (ValueError, RuntimeError, LookupError, ArithmeticError)


class Recorder:
    """Notes what each batch adds to what a validation loop logs, and to the metrics that a module holds.

    Args:
        lists: whether metrics count that keep lists of all that they saw, and take long to compute again and again.
    """

    def __init__(self, *, lists: bool = True) -> None:
        self._lists = lists
        self._means: dict[str, list[tuple[float, float]]] = {}
        self._metrics: dict[str, States] = {}
        self._samples = 0

    def note(self, logged: Mapping[str, Any], metrics: Mapping[str, Metric], batch: Any = None) -> None:
        """Read the running sums after a batch.

        Args:
            logged: name to Lightning's own record of what was logged.
            metrics: name to metric, of all that the module holds.
            batch: whose samples are counted, along the first size of its first tensor.
        """
        tensors = (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
        self._samples += next(map(len, tensors), 0)
        for name, item in logged.items():
            if item.is_tensor and item.meta.is_mean_reduction:
                reached = (float(item.value), float(item.cumulated_batch_size))
                self._means.setdefault(name, []).append(reached)
        for name, metric in metrics.items():
            if self._lists or not any(isinstance(default, list) for default in metric._defaults.values()):
                self._metrics.setdefault(name, States(metric)).note()

    def contributions(self, name: str, value: float, metric: Metric | None = None) -> Contributions | None:
        """Return the parts of a logged metric; None where they do not make up its value.

        Args:
            name: as it was logged.
            value: its value.
            metric: what was logged under that name, where it was a metric and no number.
        """
        if name in self._means:
            return checked(_of_running(self._means[name]), value)
        own = [n for n, states in self._metrics.items() if metric is not None and states.metric is metric]
        for source in own or self._metrics:
            if (parts := checked(self._of_states(source), value)) is not None:
                return parts
        return None

    def so_far(self, known: Mapping[str, Contributions]) -> dict[str, Contributions]:
        """Return the parts up to now of metrics whose parts another run of the same validation had.

        Args:
            known: name as it is logged to the parts of that run.
        """
        by_name = {
            name: self._of_states(parts.source) if parts.source else _of_running(self._means.get(name, []))
            for name, parts in known.items()
        }
        return {name: parts for name, parts in by_name.items() if parts is not None and parts.number}

    def _of_states(self, source: str) -> Contributions | None:
        parts = self._metrics[source].contributions() if source in self._metrics else None
        return None if parts is None else dataclasses.replace(parts, samples=self._samples, source=source)


def _of_running(reached: list[tuple[float, float]]) -> Contributions:
    """Return the contributions of batches from running sums and numbers of samples."""
    values, weights, before = [], [], (0.0, 0.0)
    for total, number in reached:
        weight = number - before[1]
        if weight > 0:
            values.append((total - before[0]) / weight)
            weights.append(weight)
        before = (total, number)
    return of_means(values, weights)


def checked(parts: Contributions | None, value: float) -> Contributions | None:
    """Return parts that make up a value; None where they do not."""
    if parts is None or not parts.number:
        return None
    whole = parts.of(range(parts.number))
    return parts if abs(whole - value) <= _TOLERANCE * max(abs(value), _TOLERANCE) else None


class States:
    """What each batch added to the states of a metric, where these are sums or lists of what was seen.

    Args:
        metric: is read after each of its updates.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._steps: list[dict[str, Any]] = []
        self._lists: dict[str, list[Tensor]] = {}
        self._room = _MAX_BYTES

    def note(self) -> None:
        """Read what the metric holds after an update."""
        states = {name: getattr(self.metric, name) for name in self.metric._defaults}
        # A matrix for each of many batches, as of a thousand classes, would not fit into memory.
        self._room -= sum(v.nbytes for v in states.values() if isinstance(v, Tensor))
        if self._room < 0:
            self._steps = []
            return
        self._steps.append({n: len(v) if isinstance(v, list) else v.detach().cpu().clone() for n, v in states.items()})
        # The lists themselves are emptied when validation ends.
        self._lists = {n: list(v) for n, v in states.items() if isinstance(v, list)}

    @property
    def number(self) -> int:
        """Updates by now."""
        return len(self._steps)

    def contributions(self) -> Contributions | None:
        """Return what the updates added; None where the states are no sums and no lists."""
        reductions = {name: getattr(kind, "__name__", "") for name, kind in self.metric._reductions.items()}
        starts = {n: d.detach().cpu() for n, d in self.metric._defaults.items() if isinstance(d, Tensor)}
        if not self._steps or not reductions or any(reductions[name] != "dim_zero_sum" for name in starts):
            return None
        added, twin = self._added(starts), copy.deepcopy(self.metric).cpu()

        def value(states: Mapping[str, Any], updates: int) -> float:
            for name, state in states.items():
                setattr(twin, name, state)
            twin._computed, twin._update_count = None, updates
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    computed = twin.compute()
            except _UNDEFINED:
                return math.nan
            return float(computed) if isinstance(computed, Tensor) and computed.numel() == 1 else math.nan

        def sums(parts: Sequence[int]) -> dict[str, Tensor]:
            return {
                n: start + sum((added[i][n] for i in parts), torch.zeros_like(start)) for n, start in starts.items()
            }

        def of(parts: Sequence[int]) -> float:
            lists = {name: [tensor.cpu() for i in parts for tensor in added[i][name]] for name in self._lists}
            return value({**lists, **sums(parts)}, len(parts))

        counts = not self._lists and not any(start.is_floating_point() for start in starts.values())
        whole, moved = sums(range(len(added))), None
        if counts:
            moved = functools.partial(_moved, value, whole, len(added))
        elif {"preds", "target"} <= self._lists.keys():
            moved = functools.partial(_answered_otherwise, value, whole, self._lists, len(added))
        return Contributions(len(added), of, step=moved)

    def _added(self, starts: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Return what each update added to sums, which start somewhere, and to lists."""
        added: list[dict[str, Any]] = []
        before: dict[str, Any] = {**dict.fromkeys(self._lists, 0), **starts}
        for step in self._steps:
            added.append(
                {n: self._lists[n][before[n] : v] if n in self._lists else v - before[n] for n, v in step.items()}
            )
            before = step
        return added


def _moved(value: Callable[[Mapping[str, Any], int], float], counts: Mapping[str, Tensor], updates: int) -> float:
    """Return by how much a metric changes where one of its counts goes to another, at most; 0 for too many counts."""
    if sum(count.numel() for count in counts.values()) > _MOST_CELLS:
        return 0.0
    before, changes = value(counts, updates), [0.0]
    for name, count in counts.items():
        for cell in range(count.numel()):
            more = count.clone()
            more.view(-1)[cell] += 1
            changes.append(value({**counts, name: more}, updates) - before)
    changes = [change for change in changes if math.isfinite(change)]
    return max(changes) - min(changes)


def _answered_otherwise(
    value: Callable[[Mapping[str, Any], int], float],
    sums: Mapping[str, Tensor],
    lists: Mapping[str, list[Tensor]],
    updates: int,
) -> float:
    """Return by how much a metric changes where one sample is answered like another, of those tried; 0 for no such.

    Tried are, for each class or output, the samples of the highest and the lowest score among those of one target, of
    which there are fewest where targets are classes: they are given the lowest and the highest score of all.
    """
    # Images and texts are no scores.
    if any(t.dim() > 2 or t.shape[1:] != own[0].shape[1:] for own in lists.values() for t in own):
        return 0.0
    states = {**sums, **{name: torch.cat([torch.atleast_1d(t).cpu() for t in own]) for name, own in lists.items()}}
    preds, target = states["preds"], states["target"]
    if len(preds) != len(target) or not len(preds):
        return 0.0
    before, changes = value(states, updates), [0.0]
    for column, rows in _kinds(preds, target):
        scores = preds if preds.dim() == 1 else preds[:, column]
        own = scores[rows]
        for at, other in ((rows[own.argmax()], scores.argmin()), (rows[own.argmin()], scores.argmax())):
            changed = preds.clone()
            changed[at] = preds[other]
            changes.append(value({**states, "preds": changed}, updates) - before)
    return max(abs(change) for change in changes if math.isfinite(change))


def _kinds(preds: Tensor, target: Tensor) -> list[tuple[int, Tensor]]:
    """Return columns of scores, and the samples of one target that are compared by them, the rarest targets first."""
    columns = 1 if preds.dim() == 1 else preds.shape[1]
    if target.is_floating_point():
        kinds = [(column, torch.arange(len(target))) for column in range(columns)]
    elif target.dim() == 2:
        values = [(column, value) for column in range(columns) for value in target[:, column].unique().tolist()]
        kinds = [(column, (target[:, column] == value).nonzero().flatten()) for column, value in values]
    else:
        values = [(value if preds.dim() == 2 else 0, value) for value in target.unique().tolist()]
        kinds = [(c, (target == value).nonzero().flatten()) for c, value in values if 0 <= c < columns]
    return sorted(kinds, key=lambda kind: len(kind[1]))[:_MOST_KINDS]
