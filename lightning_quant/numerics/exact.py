"""Arithmetic in which sums of integers are exact in float32 on every device, while a block runs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# Where PyTorch says how it computes in float32: in full, or in TF32 or bfloat16 where a processor has it.
_FLOAT32 = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
# Where half precision may be summed up in half precision.
_HALF = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Compute in float32 in full, in kernels that only multiply and add; everything is put back afterwards.

    TF32 keeps ten bits of a factor, and cuDNN's transformed convolutions divide: both turn whole sums into others, and
    an integer that was simulated on a GPU would not be the one that an integer kernel computes.
    """
    with ExitStack() as stack:
        places = [place for name in _FLOAT32 if (place := _place(name)) is not None]
        for place in places:
            stack.callback(_set_precision, place, place.fp32_precision)
        # The older settings, which some of PyTorch still reads, are kept in step with the newer ones.
        precision, in_tf32 = (
            _or_none(torch.get_float32_matmul_precision),
            _or_none(lambda: torch.backends.cudnn.allow_tf32),
        )
        if precision is not None:
            stack.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
        if in_tf32 is not None:
            _set(stack, torch.backends.cudnn, "allow_tf32", False)
        for place in places:
            _set_precision(place, "ieee")
        for name in _HALF:
            if hasattr(torch.backends.cuda.matmul, name):
                _set(stack, torch.backends.cuda.matmul, name, False)
        _set(stack, torch.backends.cudnn, "enabled", False)
        yield


def _place(name: str) -> Any:
    """Return the part of `torch.backends` of that name; None where this PyTorch has no setting for it alone."""
    backend, _, operation = name.partition(".")
    place = getattr(getattr(torch.backends, backend), operation, None)
    return place if hasattr(place, "fp32_precision") else None


def _set_precision(place: Any, value: str) -> None:
    if place.fp32_precision != value:
        place.fp32_precision = value


def _or_none(setting: Callable[[], Any]) -> Any:
    """Return one of the older settings; None where the newer ones cannot be said in it."""
    try:
        return setting()
    except RuntimeError:
        return None


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
