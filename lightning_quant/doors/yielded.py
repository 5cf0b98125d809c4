"""What a function of the user's gives of a module: numbers, values of samples, and metrics of torchmetrics.

Part by part, a metric is yielded after each of its updates. What these add to its states makes intervals of metrics
that are no means, F1 say, as it does of those that a validation loop logs.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_quant.errors import EvaluationError
from lightning_quant.measure.contributions import Contributions, Metrics, of_samples

# What a function is called by that gives a number and no dict.
METRIC = "metric"


def given_whole(given: Any) -> Metrics:
    """Return the metrics of what a function returns at once.

    Raises:
        EvaluationError: it is something else.
    """
    named = _named(given)
    numbers = {name: _numbers(value.compute() if _is_metric(value) else value) for name, value in named.items()}
    values = {name: float(x.mean()) if x.numel() else math.nan for name, x in numbers.items()}
    parts = {name: of_samples(x.flatten().tolist()) for name, x in numbers.items() if x.numel() > 1}
    return Metrics(values, _directions(named), contributions=parts)


class Yielded:
    """What was yielded by now."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._states: dict[str, Any] = {}
        self._samples = 0

    def add(self, part: Any, samples: int) -> None:
        """Take one part.

        Args:
            part: as it was yielded.
            samples: that the module was called with by now, in all.

        Raises:
            EvaluationError: it is no number, no metric, or another metric than before.
        """
        self._samples = samples
        for name, value in _named(part).items():
            if _is_metric(value):
                self._note(name, value)
            else:
                self._values.setdefault(name, []).extend(_numbers(value).flatten().tolist())

    def _note(self, name: str, metric: Any) -> None:
        from lightning_quant.measure.recorder import States

        states = self._states.setdefault(name, States(metric))
        if states.metric is not metric:
            raise EvaluationError(
                f"Expected `evaluate` to yield one metric as {name!r}, updated from part to part, but got another."
            )
        states.note()

    @property
    def number(self) -> int:
        """Samples, or updates of metrics where nothing has values of samples."""
        updates = (states.number for states in self._states.values())
        return max([*map(len, self._values.values()), *updates], default=0)

    def contributions(self) -> dict[str, Contributions]:
        """Return what each part has added, by metric."""
        values = {name: of_samples(numbers) for name, numbers in self._values.items() if len(numbers) > 1}
        return values | self._of_states()

    def metrics(self) -> Metrics:
        """Return the metrics of all that was yielded."""
        from lightning_quant.measure.recorder import checked

        values = {name: fmean(numbers) for name, numbers in self._values.items() if numbers}
        metrics = {name: states.metric for name, states in self._states.items()}
        values |= {name: float(_numbers(metric.compute()).mean()) for name, metric in metrics.items()}
        # What parts do not make up says nothing of the whole.
        parts = {name: own for name, own in self.contributions().items() if checked(own, values[name]) is not None}
        return Metrics(values, _directions(metrics), contributions=parts)

    def _of_states(self) -> dict[str, Contributions]:
        every = {name: states.contributions() for name, states in self._states.items()}
        return {name: replace(parts, samples=self._samples) for name, parts in every.items() if parts is not None}


@contextmanager
def counted_samples(module: nn.Module) -> Iterator[Callable[[], int]]:
    """Count samples along the first size of the first tensor that a module is called with."""
    number = 0

    def count(_: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal number
        tensors = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim())
        number += next(map(len, tensors), 0)

    handle = module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield lambda: number
    finally:
        handle.remove()


def _named(given: Any) -> Mapping[str, Any]:
    return {str(name): value for name, value in (given if isinstance(given, Mapping) else {METRIC: given}).items()}


def _is_metric(value: Any) -> bool:
    # Whoever has one has imported them, which takes seconds.
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)


def _directions(named: Mapping[str, Any]) -> dict[str, bool]:
    known = {name: value.higher_is_better for name, value in named.items() if _is_metric(value)}
    return {name: bool(higher) for name, higher in known.items() if higher is not None}


def _numbers(value: Any) -> Tensor:
    try:
        return torch.as_tensor(value).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise EvaluationError(
            "Expected `evaluate` to give numbers, values of samples, metrics of torchmetrics, or a dict of them, but "
            f"got {value!r:.60}."
        ) from error
