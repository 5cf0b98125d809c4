"""What batches are made of: classes of projects that PyTorch's pytree does not know become structures that it does.

Dataclasses, batches of graphs, dicts with methods: whatever holds tensors as attributes or items.
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lightning_quant.errors import CaptureError

CONSTANTS = (type(None), bool, int, float, str, complex, torch.dtype, torch.device, torch.Size)
"""Types of leaves that graphs and files can hold as they are."""


@dataclasses.dataclass(frozen=True)
class _Kept:
    """An attribute that is neither tensor nor constant, taken over as it is; those of one type count as equal."""

    value: Any = dataclasses.field(compare=False)
    kind: type

    def __repr__(self) -> str:
        return f"<{self.kind.__name__}>"

    def __deepcopy__(self, memo: Any) -> "_Kept":
        return self


def register_structures(tree: Any) -> None:
    """Let pytree look into every object of a tree that holds tensors.

    Registration is for the process, as pytree's always is; classes that are registered already keep what they have.

    Raises:
        CaptureError: an object contains itself.
    """
    try:
        for leaf in pytree.tree_leaves(tree):
            if type(leaf) not in pytree.SUPPORTED_NODES and _is_structure(leaf):
                _register(type(leaf))
                register_structures(leaf)
    except RecursionError as error:
        raise CaptureError(
            "Expected calls of tensors in structures, but got an object that contains itself. Quantize a child module "
            "that receives tensors: `module=...`."
        ) from error


def named_leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and value of every leaf, in pytree's order.

    Unlike pytree's own function this takes classes that were registered without names of their children: those of
    dataclasses are found by value, others are numbered.
    """
    if pytree.tree_is_leaf(tree):
        yield path, tree
        return
    node = pytree.SUPPORTED_NODES[pytree._get_node_type(tree)]
    if node.flatten_with_keys_fn is not None:
        children = [(_part(key), child) for key, child in node.flatten_with_keys_fn(tree)[0]]
    else:
        names = {id(value): name for name, value in _attributes(tree).items()}
        children = [(names.get(id(c), str(i)), c) for i, c in enumerate(node.flatten_fn(tree)[0])]
    for name, child in children:
        yield from named_leaves(child, (*path, name))


def reachable_tensors(value: Any) -> list[Tensor]:
    """Return the tensors of a value in order, those that objects of whatever class hold among them."""
    tensors: list[Tensor] = []
    seen: set[int] = set()

    def visit(tree: Any) -> None:
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, Tensor):
                tensors.append(leaf)
            elif id(leaf) not in seen and not isinstance(leaf, (*CONSTANTS, nn.Module, type)):
                seen.add(id(leaf))
                visit([*_attributes(leaf).values(), *_items(leaf).values()])

    visit(value)
    return tensors


def _part(key: Any) -> str:
    return next(str(getattr(key, name)) for name in ("key", "idx", "name") if hasattr(key, name))


def _is_structure(value: Any) -> bool:
    """Tell whether a leaf is an object with tensors inside."""
    # Batches of graphs can be called, too.
    if isinstance(value, (*CONSTANTS, Tensor, nn.Module, type, functools.partial, fx.Proxy)) or inspect.isroutine(
        value
    ):
        return False
    if any((base.__name__, base.__module__) == ("Cache", "transformers.cache_utils") for base in type(value).__mro__):
        return False
    if dataclasses.is_dataclass(value):
        return True
    leaves = pytree.tree_leaves([*_attributes(value).values(), *_items(value).values()])
    return any(isinstance(leaf, Tensor | fx.Proxy) or _is_structure(leaf) for leaf in leaves)


def _attributes(value: Any) -> dict[str, Any]:
    """Return what hangs on an object: its slots, and its own attributes."""
    slots = [name for base in type(value).__mro__ for name in _slots(base)]
    return {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **getattr(value, "__dict__", {})}


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    return [name for name in ((slots,) if isinstance(slots, str) else slots) if name not in ("__dict__", "__weakref__")]


def _items(value: Any) -> dict[Any, Any]:
    """Return the items of a subclass of dict, list or tuple."""
    if isinstance(value, dict):
        return dict(value.items())
    return dict(enumerate(value)) if isinstance(value, list | tuple) else {}


def _register(kind: type) -> None:
    if dataclasses.is_dataclass(kind) and _is_made_of_its_fields(kind):
        pytree.register_dataclass(kind)
        return

    def flatten_with_keys(value: Any) -> tuple[list[Any], Any]:
        register_structures([_attributes(value), _items(value)])
        children: list[Any] = [(pytree.MappingKey(key), item) for key, item in _items(value).items()]
        num_items = len(children)
        kept = []
        for name, item in _attributes(value).items():
            if all(isinstance(leaf, (Tensor, fx.Proxy, *CONSTANTS)) for leaf in pytree.tree_leaves(item)):
                children.append((pytree.GetAttrKey(name), item))
            else:
                kept.append((name, _Kept(item, type(item))))
        names = tuple(key.key if index < num_items else key.name for index, (key, _) in enumerate(children))
        return children, (num_items, names, tuple(kept))

    def flatten(value: Any) -> tuple[list[Any], Any]:
        children, context = flatten_with_keys(value)
        return [child for _, child in children], context

    def unflatten(children: Any, context: Any) -> Any:
        (num_items, names, kept), values = context, list(children)
        value: Any = tuple.__new__(kind, values[:num_items]) if issubclass(kind, tuple) else kind.__new__(kind)
        if issubclass(kind, dict):
            dict.update(value, zip(names[:num_items], values[:num_items], strict=True))
        elif issubclass(kind, list):
            list.extend(value, values[:num_items])
        for name, item in zip(names[num_items:], values[num_items:], strict=True):
            object.__setattr__(value, name, item)
        for name, item in kept:
            object.__setattr__(value, name, item.value)
        return value

    pytree.register_pytree_node(kind, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys)


def _is_made_of_its_fields(kind: Any) -> bool:
    """Tell whether calling a dataclass with its fields makes an equal one: no pseudo-fields, none left to make."""
    fields = dataclasses.fields(kind)
    return list(inspect.signature(kind).parameters) == [field.name for field in fields if field.init] and all(
        field.init for field in fields
    )
