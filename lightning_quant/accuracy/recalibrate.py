"""Calibrate again on recorded calls, as is due after layers or channel scales have changed."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_quant.bias_correction import InputMeans
from lightning_quant.calibrate import observe, settle
from lightning_quant.calls import map_tensors
from lightning_quant.prepared import Prepared
from lightning_quant.ranges import Ranges

Call = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def observe_anew(prepared: Prepared, calls: list[Call]) -> None:
    """Forget all ranges and bias corrections, and learn them from calls."""
    prepared.ranges = Ranges(prepared.ranges.edges, prepared.recipe, prepared.observer)
    means = InputMeans() if prepared.recipe.bias_correction else None
    steps = [functools.partial(prepared.root, *args, **kwargs) for args, kwargs in calls]
    settle(prepared, observe(prepared, steps, means), means)


@contextmanager
def recorded_calls(module: nn.Module, limit: int | None = None) -> Iterator[list[Call]]:
    """Record the arguments of every call of a module, or of the first ones, detached copies of its tensors."""
    calls: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if limit is None or len(calls) < limit:
            calls.append(map_tensors(lambda tensor: tensor.detach().clone(), (args, kwargs)))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
