"""Record what a module is called with."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_quant.calls.calls import Call
from lightning_quant.errors import NoEffectWarning

# What recorded calls may hold, in memory of the module's device.
RECORDED_BYTES = 1 << 30


@contextmanager
def recorded_calls(module: nn.Module, limit: int | None = None) -> Iterator[list[Call]]:
    """Record the arguments of every call of a module, or of the first ones, detached copies on the module's device.

    Of calls beyond `RECORDED_BYTES` the first two are kept, and a warning says how many were left out.
    """
    calls: list[Call] = []
    held, left_out = 0, 0

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal held, left_out
        if limit is not None and len(calls) >= limit:
            return
        size = sum(leaf.nbytes for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if len(calls) >= 2 and held + size > RECORDED_BYTES:
            left_out += 1
            return
        held += size
        calls.append(Call(args, kwargs).detached())

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
    if left_out:
        warnings.warn(
            f"Algorithms for accuracy, and the ranges behind them, see the first {len(calls)} of "
            f"{len(calls) + left_out} calls, whose inputs take {held / 2**20:.0f} MiB.",
            NoEffectWarning,
            stacklevel=2,
        )
