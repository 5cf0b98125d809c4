"""What Python decides by looking into tensors: `if lengths.min() == 0`, `int(lengths.max())`, packed sequences.

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

from lightning_quant.calls import map_tensors
from lightning_quant.signature import tensor_leaves

# What Python calls to make a truth value or a whole number of a tensor.
_READS = ("__bool__", "__int__", "__index__", "item")
_WHOLE, _PADDED = "whole", "padded"
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_HERE, _TORCH = os.path.dirname(os.path.abspath(__file__)) + os.sep, os.path.dirname(torch.__file__) + os.sep


class _Whole(TorchFunctionMode):
    """Runs recurrences on packed sequences of which none is padded as on others, so that no size is read of them."""

    def __init__(self) -> None:
        super().__init__()
        # Sizes of the steps of a packed sequence, with the numbers of steps and of samples.
        self.packed: dict[int, tuple[Tensor, Any, Any]] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name in _READS and len(args) == 1 and isinstance(args[0], Tensor):
            return self.read(function, args[0])
        if name == "_pack_padded_sequence" and self.packs_whole(args[1], args[0].shape[int(args[2])]):
            return self._pack(args[0], args[2])
        if name == "__getitem__" and id(args[0]) in self.packed and args[1] == 0:
            return self.packed[id(args[0])][2]
        if len(args) > 1 and id(args[1]) in self.packed:
            _, steps, samples = self.packed[id(args[1])]
            if name == "_pad_packed_sequence":
                return self._pad(args[0], steps, samples, args[2])
            if name in _RECURRENT:
                return self._run(function, args, kwargs, steps, samples)
        return function(*args, **kwargs)

    def read(self, function: Any, tensor: Tensor) -> Any:
        """Return the truth value or number of a tensor."""
        raise NotImplementedError

    def packs_whole(self, lengths: Tensor, steps: Any) -> bool:
        """Tell whether sequences of these lengths, `(samples,)`, are all of that many steps."""
        raise NotImplementedError

    def _pack(self, x: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, 1) if batch_first else x
        steps, samples = x.shape[:2]
        sizes = torch.full((steps,), samples, dtype=torch.int64)
        self.packed[id(sizes)] = sizes, steps, samples
        return x.reshape(-1, *x.shape[2:]), sizes

    def _pad(self, data: Tensor, steps: Any, samples: Any, batch_first: bool) -> tuple[Tensor, Tensor]:
        padded = data.reshape(steps, samples, *data.shape[1:])
        lengths = torch.full((samples,), steps, dtype=torch.int64)
        return (padded.transpose(0, 1) if batch_first else padded), lengths

    def _run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], steps: Any, samples: Any) -> Any:
        data, _, *rest = args
        output, *states = function(data.reshape(steps, samples, data.shape[-1]), *rest, batch_first=False, **kwargs)
        return output.reshape(-1, output.shape[-1]), *states


class _Looking(_Whole):
    """Notes, in order, what is read out of tensors and which line of the user's code reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.decided: list[tuple[str, Any]] = []

    def read(self, function: Any, tensor: Tensor) -> Any:
        """Note what is read."""
        value = function(tensor)
        self.decided.append((_line(), value))
        return value

    def packs_whole(self, lengths: Tensor, steps: Any) -> bool:
        """Note whether they are."""
        is_whole = bool((lengths == steps).all())
        self.decided.append((_line(), _WHOLE if is_whole else _PADDED))
        return is_whole


class _Answering(_Whole):
    """Answers what is read as it was decided, and collects what must hold for that."""

    def __init__(self, decided: tuple[tuple[str, Any], ...]) -> None:
        super().__init__()
        self.left = [value for _, value in decided]
        self.conditions: list[Tensor] = []

    def read(self, function: Any, tensor: Tensor) -> Any:
        """Answer what was read."""
        if not self.left:
            return function(tensor)
        value = self.left.pop(0)
        held = (tensor != 0) == value if isinstance(value, bool) else tensor == value
        self.conditions.append(held.reshape(()))
        return value

    def packs_whole(self, lengths: Tensor, steps: Any) -> bool:
        """Answer that they are, which must hold."""
        if not self.left or self.left.pop(0) != _WHOLE:
            return False
        self.conditions.append((lengths == steps).all())
        return True


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

    Packing sequences of which none is padded counts as such.

    Empty where nothing is read, or where no file can answer for it: it reads other numbers, packs padded sequences, or
    returns no numbers that could be NaN.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _Looking() as looking:
        result = module(*args, **kwargs)
    if not all(isinstance(value, bool | int) or value == _WHOLE for _, value in looking.decided):
        return ()
    return tuple(looking.decided) if any(t.is_floating_point() for t in tensor_leaves(result)) else ()


def in_words(decided: tuple[tuple[str, Any], ...]) -> tuple[str, ...]:
    """Return what must hold in a call, without repetitions."""
    words = (f"`{line}` {'packs whole sequences' if value == _WHOLE else f'reads {value}'}" for line, value in decided)
    return tuple(dict.fromkeys(words))


@contextmanager
def decided_as_captured(module: nn.Module, decided: tuple[tuple[str, Any], ...]) -> Iterator[None]:
    """Let a module decide as in the captured call for the time of a block, and answer NaN where that does not hold."""
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


def _line() -> str:
    """Return the line of the user's code that is running."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_HERE, _TORCH)):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
