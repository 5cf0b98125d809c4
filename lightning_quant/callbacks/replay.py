"""Calibration's calls of a module, recorded for several recipes: data and the user's step run once."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_quant.calls.calls import Call
from lightning_quant.calls.recorded_calls import RECORDED_BYTES, recorded_calls
from lightning_quant.capture.capture import isolated_rng, unchanged
from lightning_quant.surgery.routing import evaluation_mode

# The calls of the module that each step made.
Steps = list[list[Call]]


def recorded_steps(root: nn.Module, steps: Iterable[Callable[[], Any]], number: int) -> Steps | None:
    """Run steps and record what they call a module with; None where that would take more memory than calls may.

    Args:
        root: the module, which runs in evaluation mode.
        steps: each calls it.
        number: how many steps there will be, at most.
    """
    recorded: Steps = []
    with recorded_calls(root) as calls, evaluation_mode(root), torch.no_grad():
        for step in steps:
            before = len(calls)
            step()
            recorded.append(calls[before:])
            tensors = [leaf for leaf in pytree.tree_leaves(list(map(tuple, recorded[0]))) if isinstance(leaf, Tensor)]
            if number * sum(tensor.nbytes for tensor in tensors) > RECORDED_BYTES:
                return None
    return recorded


def replayed(duplicate: nn.Module, root: nn.Module, steps: Steps, seed: int) -> Iterator[Callable[[], Any]]:
    """Yield steps that make the same calls of a module, which is inside a copy of the LightningModule."""
    with isolated_rng(seed), unchanged(duplicate):
        for calls in steps:
            yield functools.partial(_make, root, calls)


@torch.no_grad()
def _make(root: nn.Module, calls: list[Call]) -> None:
    for call in calls:
        # Copies: a module may write into what it is given.
        args, kwargs = call.detached()
        root(*args, **kwargs)
