"""What no proxy overrides and becomes nodes all the same: constructors, the larger of two sizes, buffers set anew."""

import builtins
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

_CONSTRUCTORS = ("rand", "randn", "zeros", "ones", "full", "empty", "arange", "linspace", "eye")
_WRITES = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


@contextmanager
def functions_recorded(tracer: fx.Tracer) -> Iterator[None]:
    """Let `torch.rand(x.shape[0], 1)`, `max(x.shape[2] - 5, 0)` and their kind become nodes when a size is a proxy."""

    def recorded(original: Callable[..., Any], target: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
                return tracer.create_proxy("call_function", target, args, kwargs)
            return original(*args, **kwargs)

        return call

    def recorded_extreme(original: Callable[..., Any], target: Callable[..., Any]) -> Callable[..., Any]:
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

    originals: dict[tuple[Any, str], Any] = {(torch, name): getattr(torch, name) for name in _CONSTRUCTORS}
    replaced: dict[tuple[Any, str], Any] = {
        place: recorded(original, original) for place, original in originals.items()
    }
    for name, target in (("max", torch.sym_max), ("min", torch.sym_min)):
        originals[builtins, name] = getattr(builtins, name)
        replaced[builtins, name] = recorded_extreme(getattr(builtins, name), target)
    set_attribute = originals[nn.Module, "__setattr__"] = nn.Module.__setattr__

    def set_buffer(module: nn.Module, name: str, value: Any) -> None:
        # `self.calls += 1`, or `= self.calls + 1`: what the graph leaves in the buffer has to be the same.
        if isinstance(value, fx.Proxy) and name in module._buffers:
            buffer = getattr(module, name)
            if not (value.node.args and value.node.args[0] is buffer.node and value.node.target in _WRITES):
                buffer.copy_(value)
            return
        set_attribute(module, name, value)

    replaced[nn.Module, "__setattr__"] = set_buffer
    for (owner, name), function in replaced.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)
