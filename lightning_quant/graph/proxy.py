"""Proxies that answer as the value would that they stand for, and that record in-place arithmetic.

What Python code asks of a value beside computing with it (whether it is a tensor, has an attribute, on what device it
is) is answered from the fake value that the tracer carries; a plain proxy of `torch.fx` says yes to everything. What no
fake value can tell, because it depends on the call or on how gradients are taken, stays a node or cannot be traced.
"""

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Size, Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from lightning_quant.calls.structures import register_structures
from lightning_quant.errors import UntraceableError

# Values that no input of a deployed model changes: Python code gets them themselves.
_SETTLED = (type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format)
# Truth values of a tensor that are no matter of its kind: of sizes, or of whether gradients are taken.
_UNSETTLED = frozenset({"is_same_size", "is_set_to", "requires_grad", "is_leaf", "retains_grad", "is_inference"})
# What training leaves with a tensor, and evaluation does not; it may be None, which no node is.
_HISTORY = frozenset({"grad", "grad_fn", "_grad", "_grad_fn", "_base", "_backward_hooks"})


class UnknownError(Exception):
    """The value of a node cannot be told from those that it reads; the message says why."""


class ShapedProxy(fx.Proxy):
    """A proxy that knows rank, dtype and device, which no input of a deployed model changes."""

    def __getattr__(self, name: str) -> Any:
        if name in ("node", "tracer"):  # Of a proxy that is being made.
            raise AttributeError(name)
        owner = Tensor if self.is_unknown or isinstance(self.fake, FakeTensor) else self.fake
        if not hasattr(owner, name):
            if self.is_unknown:
                self._known(name)
            raise AttributeError(f"'{self.kind.__name__}' object has no attribute '{name}'")
        if issubclass(self.kind, Tensor) and name in _HISTORY:
            raise UntraceableError(f"`.{name}` is asked for, which differs from training to evaluation")
        if callable(getattr(owner, name)):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    @property
    def fake(self) -> Any:
        """The fake tensor, or other value, that stands for the traced one."""
        return self.node.meta.get("fake")

    @property
    def kind(self) -> type:
        """The class of the value. Not `__class__`: PyTorch's C code would take the proxy for a tensor's memory."""
        return Tensor if self.is_unknown or isinstance(self.fake, FakeTensor) else type(self.fake)

    @property
    def is_unknown(self) -> bool:
        """Whether there is no such value."""
        return "fake" not in self.node.meta

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self._known("ndim")

    def dim(self) -> int:
        """Number of dimensions."""
        return self._known("ndim")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self._known("dtype")

    @property
    def device(self) -> torch.device:
        """Where the tensor is."""
        return self._known("device")

    def is_floating_point(self) -> bool:
        """Whether the values are floating point."""
        return self._known("dtype").is_floating_point

    # Left alone, `y += x` would be traced as `y = y + x`, and other names of the same tensor would miss the change.
    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)

    # Python's functions of one number, which sizes are.
    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __trunc__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.trunc, (self,), {})

    # Python takes nothing but numbers for an answer; where the classes are asked that forwards know, see `recorded`.
    def __int__(self) -> int:
        raise self._number_asked("int")

    def __float__(self) -> float:
        raise self._number_asked("float")

    # Of `range`, entries and slices of lists, and functions that take whole numbers alone.
    def __index__(self) -> int:
        if type(self.fake) is int:
            raise UntraceableError(
                "a size of an input says how often a loop runs or which entry of a list is taken, as in "
                "`range(x.shape[1])`, and a graph is of one number of steps"
            )
        raise UntraceableError(
            "a value of a tensor says how often a loop runs or which entry of a list is taken, as in "
            "`range(lengths.max())`, and it differs from call to call"
        )

    def _number_asked(self, kind: str) -> UntraceableError:
        vars(self.tracer)["numbers_asked"] = True
        return UntraceableError(f"a number is made of a tensor or a size by `{kind}`")

    def _in_place(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __len__(self) -> int:
        if isinstance(self.fake, tuple | list | dict):
            return len(self.fake)
        return fx.Proxy.__len__(self)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.fake, tuple | list):
            return iter([operator.getitem(self, index) for index in range(len(self.fake))])
        if isinstance(self.fake, dict):
            return iter(self.fake)
        return fx.Proxy.__iter__(self)

    def __contains__(self, item: Any) -> bool:
        if isinstance(self.fake, dict):
            return item in self.fake
        raise UntraceableError("what a tensor holds is asked for")

    def __hash__(self) -> int:
        # A number is looked up by its value, `self.heads[x.shape[1]]` say; tensors are told apart by themselves.
        return object.__hash__(self) if self._is_tensor() else hash(self._decided())

    def __str__(self) -> str:
        return fx.Proxy.__repr__(self) if self._is_tensor() else str(self._decided())

    def __format__(self, spec: str) -> str:
        return object.__format__(self, spec) if self._is_tensor() else format(self._decided(), spec)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._is_tensor():
            return self.tracer.create_proxy("call_method", "clone", (self,), {})
        return self

    @property
    def keys(self) -> Any:
        """The method of dicts, which tensors have not."""
        return self.__getattr__("keys") if self.is_unknown or not isinstance(self.fake, dict) else self.fake.keys

    def _is_tensor(self) -> bool:
        return self.is_unknown or isinstance(self.fake, Tensor)

    def _decided(self) -> Any:
        """Return the value in the captured call, which what follows is right for, as the graph says itself."""
        if isinstance(self.fake, bool | int | float) and not self == self.fake:
            raise UntraceableError("a number is not what it is")
        return self.fake

    def _known(self, name: str) -> Any:
        if not isinstance(self.fake, Tensor):
            why = f" ({self.node.meta['unknown']})" if "unknown" in self.node.meta else ""
            raise UntraceableError(f"`.{name}` of a value of unknown kind is needed{why}")
        return getattr(self.fake, name)


def fake_of(leaf: Any) -> Any:
    """Return what stands for a proxy, also for those of a slice, which pytrees do not look into; other leaves as is."""
    if isinstance(leaf, slice):
        return slice(fake_of(leaf.start), fake_of(leaf.stop), fake_of(leaf.step))
    if not isinstance(leaf, fx.Proxy):
        return leaf
    if "unknown" in leaf.node.meta:
        raise UnknownError(leaf.node.meta["unknown"])
    return leaf.node.meta.get("fake")


def settled(proxy: fx.Proxy, name: str) -> Any:
    """Return what Python code gets for a node: its value where no call changes that, a proxy else.

    Args:
        proxy: of a node that has just been made.
        name: of what it does.
    """
    fake = proxy.node.meta.get("fake")
    if "fake" not in proxy.node.meta or proxy.node.op in ("placeholder", "get_attr"):
        return proxy
    if proxy.node.op == "call_module":
        return fake if fake is None else _opened(proxy)
    of_tensors = all(isinstance(read.meta.get("fake"), Tensor) for read in proxy.node.all_input_nodes)
    if isinstance(fake, _SETTLED) or (isinstance(fake, bool) and of_tensors and name not in _UNSETTLED):
        if fake is not None:  # What returns nothing is there for what it does.
            proxy.node.graph.erase_node(proxy.node)
        return fake
    return proxy


def _opened(proxy: fx.Proxy) -> Any:
    """Return what a module answers as the container that it is, of proxies."""
    fake = proxy.node.meta["fake"]
    register_structures(fake)
    if isinstance(fake, Tensor | Size) or pytree.tree_is_leaf(fake):
        return proxy
    try:
        leaves, treespec = pytree.tree_flatten_with_path(fake)
    except ValueError:  # Classes that were registered without names of their parts.
        return proxy
    parts: dict[Any, Any] = {(): proxy}
    for path, _ in leaves:
        for depth, key in enumerate(path, 1):
            if path[:depth] not in parts:
                parts[path[:depth]] = _part(parts[path[: depth - 1]], key)
    values = [leaf if isinstance(leaf, _SETTLED) else parts[path] for path, leaf in leaves]
    return pytree.tree_unflatten(values, treespec)


def _part(whole: Any, key: Any) -> Any:
    if isinstance(key, pytree.GetAttrKey):
        return getattr(whole, key.name)
    return operator.getitem(whole, key.key if isinstance(key, pytree.MappingKey) else key.idx)
