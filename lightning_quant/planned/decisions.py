"""What Python decides by looking into tensors: `if lengths.min() == 0`, `int(lengths.max())`.

An exporter has no values to look at. Where it refuses for that, the module is exported as it decides in the captured
call, and the file answers NaN to every call that would decide otherwise, so that no other computation passes for it.
"""

import linecache
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_quant.calls.calls import map_tensors
from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.layers.packed import kept_padded
from lightning_quant.surgery.routing import as_exported

# What Python calls to make a truth value or a whole number of a tensor.
_READS = ("__bool__", "__int__", "__index__", "item")
_HERE, _TORCH = os.path.dirname(os.path.abspath(__file__)) + os.sep, os.path.dirname(torch.__file__) + os.sep


class _Reading(TorchFunctionMode):
    """Meets what the user's code reads out of tensors."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_read = getattr(function, "__name__", "") in _READS and len(args) == 1 and isinstance(args[0], Tensor)
        line = _line() if is_read else None
        return function(*args, **(kwargs or {})) if line is None else self.read(function, args[0], line)

    def read(self, function: Any, tensor: Tensor, line: str) -> Any:
        """Return the truth value or number of a tensor."""
        raise NotImplementedError


class _Looking(_Reading):
    """Notes, in order, which line reads what."""

    def __init__(self) -> None:
        super().__init__()
        self.decided: list[tuple[str, Any]] = []

    def read(self, function: Any, tensor: Tensor, line: str) -> Any:
        """Note what is read."""
        value = function(tensor)
        self.decided.append((line, value))
        return value


class _Answering(_Reading):
    """Answers what is read as it was decided, and collects what must hold for that."""

    def __init__(self, decided: tuple[tuple[str, Any], ...]) -> None:
        super().__init__()
        self.left = list(decided)
        self.conditions: list[Tensor] = []

    def read(self, function: Any, tensor: Tensor, line: str) -> Any:
        """Answer what was read there."""
        if not self.left or self.left[0][0] != line:
            return function(tensor)
        _, value = self.left.pop(0)
        held = (tensor != 0) == value if isinstance(value, bool) else tensor == value
        self.conditions.append(held.reshape(()))
        return value


class _Decided:
    """Stands in a module's `__dict__` as `forward` while it is exported."""

    def __init__(self, forward: Any, decided: tuple[tuple[str, Any], ...]) -> None:
        self.forward, self.decided = forward, decided

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Answering(self.decided) as answering:
            result = self.forward(*args, **kwargs)
        if not answering.conditions:
            return result
        holds = torch.stack(answering.conditions).all()
        return map_tensors(lambda t: torch.where(holds, t, torch.nan) if t.is_floating_point() else t, result)


def decisions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return what a module reads out of tensors in a call: the line of its code, and the truth value or whole number.

    Empty where nothing is read, or where no file can answer for it: it reads other numbers, or returns no numbers that
    could be NaN.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]), as_exported(), kept_padded(), _Looking() as looking:
        result = module(*args, **kwargs)
    if not all(isinstance(value, bool | int) for _, value in looking.decided):
        return ()
    return tuple(looking.decided) if any(t.is_floating_point() for t in tensor_leaves(result)) else ()


def in_words(decided: tuple[tuple[str, Any], ...]) -> tuple[str, ...]:
    """Return what must hold in a call, without repetitions."""
    return tuple(dict.fromkeys(f"`{line}` reads {value}" for line, value in decided))


@contextmanager
def decided_as_captured(module: nn.Module, decided: tuple[tuple[str, Any], ...]) -> Iterator[None]:
    """Let a module decide as in the captured call while a block runs, and answer NaN where that does not hold."""
    if not decided:
        yield
        return
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = _Decided(module.forward, decided)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _line() -> str | None:
    """Return the line of the user's code that is reading; None where this package does."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or frame.f_code.co_filename.startswith(_HERE):
        return None
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
