"""Subclasses whose forward does more around that of PyTorch's layer, which stored weights take the place of."""

import functools
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.func import functional_call

_BASES: tuple[Any, ...] = (nn.LSTM, nn.GRU, nn.RNN, nn.EmbeddingBag)
_INNER = "_stored_forward"


def is_derived(layer: nn.Module) -> bool:
    """Tell whether a layer is of a class with a forward of its own, in which that of PyTorch's layer may run."""
    return any(isinstance(layer, base) and type(layer).forward is not base.forward for base in _BASES)


def call_derived(
    layer: nn.Module,
    inner: Callable[..., Any],
    values: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a derived layer's own forward, in which `super().forward` is another function.

    Args:
        layer: float layer without weights; its class is made one of which `super` knows.
        inner: takes the place of the forward of PyTorch's class.
        values: name of each parameter and buffer to what code of the subclass gets for it.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    if not issubclass(type(layer), _Redirected):
        kind: Any = type(layer)
        layer.__class__ = _redirected(kind)
    layer.__dict__[_INNER] = inner
    try:
        return functional_call(layer, values, args, kwargs)
    finally:
        del layer.__dict__[_INNER]


class _Redirected:
    """Marks classes made here."""


@functools.cache
def _redirected(kind: Any) -> Any:
    """Return a subclass of a class in whose order of bases our forward stands before that of PyTorch's class."""
    base = next(base for base in _BASES if issubclass(kind, base))
    before = type(base.__name__, (base,), {"forward": _run_inner})
    made = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce_ex__": _reduce}
    return type(kind.__name__, (kind, before, _Redirected), made)


def _run_inner(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer.__dict__[_INNER](*args, **kwargs)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    return _new, (cast(Any, type(self)).__bases__[0],), self.__getstate__()


def _new(kind: Any) -> Any:
    made = _redirected(kind)
    return made.__new__(made)
