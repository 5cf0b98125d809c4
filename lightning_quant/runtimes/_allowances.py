"""What code of a forward does that no exporter follows, and that a program can do without."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def allowances() -> Iterator[None]:
    """Let an exporter follow the code of a forward that it would refuse for what changes no result."""
    with _masks_as_given(), _Copies():
        yield


class _Array:
    """Stands for the values of a tensor that a forward keeps for itself as a NumPy array, to look at later."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"`.{name}` of a NumPy array is needed, whose values an exporter does not have")


@contextlib.contextmanager
def _masks_as_given() -> Iterator[None]:
    """Let PyTorch's transformers apply masks without looking into them first, for values that no exporter has.

    They ask whether a mask is the causal one, which faster kernels know without it.
    """
    from torch.nn.modules import transformer

    def said(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        return bool(is_causal)

    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = said
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = before


class _Copies(TorchFunctionMode):
    """Clones where code copies a tensor with `copy.deepcopy`, as metrics do that a forward makes; keeps arrays empty.

    An array that code computes with, or asks for anything, is refused there.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.clone())
        if function is Tensor.numpy and type(args[0]) not in (Tensor, nn.Parameter):
            return _Array()
        return function(*args, **(kwargs or {}))
