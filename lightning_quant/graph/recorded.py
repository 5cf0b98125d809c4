"""What no proxy overrides and becomes nodes, or is answered, all the same: constructors, lengths, buffers set anew."""

import builtins
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lightning_quant.graph.proxy import ShapedProxy

_CONSTRUCTORS = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
    "scalar_tensor", "tensor", "zeros",
)  # fmt: skip
# Their code asks for types of what it makes itself.
_LIBRARIES = frozenset({"torch", "lightning", "pytorch_lightning"})
_WRITES = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


@contextmanager
def functions_recorded(tracer: fx.Tracer) -> Iterator[None]:
    """Let `torch.rand(x.shape[0], 1)`, `max(x.shape[2] - 5, 0)` and their kind become nodes when a size is a proxy."""
    replaced: dict[tuple[Any, str], Any] = {
        (torch, name): _recorded(tracer, getattr(torch, name)) for name in _CONSTRUCTORS
    }
    replaced |= {
        (torch, "is_tensor"): lambda value: issubclass(_kind_of(value), Tensor),
        (builtins, "max"): _extreme_recorded(tracer, max, torch.sym_max),
        (builtins, "min"): _extreme_recorded(tracer, min, torch.sym_min),
        (builtins, "len"): _length_recorded(len),
        (builtins, "callable"): _callability_told(callable),
        (builtins, "isinstance"): _class_told(isinstance),
        (torch.jit.ScriptFunction, "__call__"): _scripts_inlined(torch.jit.ScriptFunction.__call__),
        (nn.Module, "__setattr__"): _buffers_written(nn.Module.__setattr__),
    }
    originals = {(owner, name): getattr(owner, name) for owner, name in replaced}
    for (owner, name), function in replaced.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)


def _recorded(tracer: fx.Tracer, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            return tracer.create_proxy("call_function", original, args, kwargs)
        return original(*args, **kwargs)

    return call


def _extreme_recorded(
    tracer: fx.Tracer, original: Callable[..., Any], target: Callable[..., Any]
) -> Callable[..., Any]:
    """Return `max` or `min` that becomes nodes, each of two sizes, where it is asked for that of sizes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        values = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
        proxies = [value for value in values if isinstance(value, fx.Proxy)]
        of_sizes = all(isinstance(proxy.node.meta.get("fake"), int | float) for proxy in proxies)
        if kwargs or len(values) < 2 or not proxies or not of_sizes:
            return original(*args, **kwargs)
        largest = values[0]
        for value in values[1:]:
            largest = tracer.create_proxy("call_function", target, (largest, value), {})
        return largest

    return call


def _scripts_inlined(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return the call of scripted functions that runs the Python function that one was made of on proxies."""

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        original = getattr(function, "_torchdynamo_inline", None)
        if original is not None and any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            return original(*args, **kwargs)
        return run(function, *args, **kwargs)

    return call


def _buffers_written(set_attribute: Callable[[nn.Module, str, Any], None]) -> Callable[[nn.Module, str, Any], None]:
    """Return the `__setattr__` of modules that writes a proxy into a buffer in place.

    Of `self.calls += 1` or `= self.calls + 1`, what the graph leaves in the buffer has to be the same.
    """

    def call(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, fx.Proxy) and name in module._buffers:
            buffer = getattr(module, name)
            if not (value.node.args and value.node.args[0] is buffer.node and value.node.target in _WRITES):
                buffer.copy_(value)
            return
        set_attribute(module, name, value)

    return call


def _length_recorded(length: Callable[[Any], int]) -> Callable[[Any], Any]:
    """Return `len` for proxies, too, whose own methods may answer with a whole number only."""

    def call(value: Any, /) -> Any:
        if type(value) is ShapedProxy and isinstance(value.fake, Tensor):
            return value.size(0)
        return length(value)

    return call


def _callability_told(is_callable: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return `callable` for proxies, too, all of which can be called."""

    def call(value: Any, /) -> bool:
        return is_callable(value.fake if type(value) is ShapedProxy else value)

    return call


def _class_told(is_instance: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """Return `isinstance` that knows what proxies stand for, but for PyTorch's own code, which has to meet proxies."""

    def call(value: Any, kinds: Any, /) -> bool:
        if type(value) is not ShapedProxy or is_instance(value, kinds):
            return is_instance(value, kinds)
        asking = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        return asking not in ("torch", __package__.partition(".")[0]) and issubclass(value.kind, kinds)

    return call


def _kind_of(value: Any) -> type:
    return value.kind if type(value) is ShapedProxy else type(value)


class _AskingType(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            kind = _kind_of(args[0])
            return _STANDS_FOR.get(kind, kind) if "int" in sys._getframe(1).f_globals else kind
        return type(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, type)


class _Type(type, metaclass=_AskingType):
    """Stands for `type` in the code of modules: that of a proxy is the class of the value that it stands for."""


class _NumberType(type):
    """Of what stands for `int` and `float`: it makes nodes of sizes, and is the same class for whoever asks."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        original = cls.__mro__[1]
        value = args[0] if len(args) == 1 and not kwargs else None
        if type(value) is not ShapedProxy or type(value.fake) not in (int, float):
            return original(*args, **kwargs)
        if original is float:
            return value.tracer.create_proxy("call_function", torch.sym_float, (value,), {})
        return value if type(value.fake) is int else value.__trunc__()

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.__mro__[1])

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.__mro__[1])

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__mro__[1]

    def __hash__(cls) -> int:
        return hash(cls.__mro__[1])


class _Int(int, metaclass=_NumberType):
    """Stands for `int` in the code of modules."""


class _Float(float, metaclass=_NumberType):
    """Stands for `float` there."""


_STANDS_FOR: dict[type, type] = {int: _Int, float: _Float}


@contextmanager
def types_told(root: nn.Module, *, numbers: bool = False) -> Iterator[None]:
    """Let `type(y) is Tensor` be true of proxies in a block, in the files of the classes of a tree's modules.

    With `numbers`, `int(x.shape[1])` is a node there, too; `x.to(int)` is an error then.
    """
    names = {kind.__module__ for module in root.modules() for kind in type(module).__mro__} - {"builtins"}
    own = [vars(sys.modules[n]) for n in names if n in sys.modules and n.partition(".")[0] not in _LIBRARIES]
    told = {"type": _Type, **({"int": _Int, "float": _Float} if numbers else {})}
    written = [(file, name) for file in own for name in told if name not in file]
    for file, name in written:
        file[name] = told[name]
    try:
        yield
    finally:
        for file, name in written:
            del file[name]
