"""The result of a call as JSON describes it: nested lists, dicts and records, with a place for every tensor."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lightning_quant.errors import ExportError


class Record(dict):
    """The fields of a dataclass that an artifact returns: readable by key, by attribute and by position."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no field {name!r} among {list(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)


def structure_of(value: Any, leaves: list[Tensor], names: list[str] | None = None, path: str = "") -> Any:
    """Describe a result, with `{"tensor": i}` for its i-th tensor.

    Args:
        value: the result, or a part of it.
        leaves: takes the tensors.
        names: takes a name for each, its path in the result.
        path: of the part.

    Raises:
        ExportError: there is something in it that JSON cannot describe.
    """

    def inside(key: Any, item: Any) -> Any:
        return structure_of(item, leaves, names, f"{path}_{key}" if path else str(key))

    if isinstance(value, Tensor):
        leaves.append(value)
        if names is not None:
            name = "".join(c if c.isalnum() else "_" for c in path) or "output"
            names.append(f"output_{name}" if name[0].isdigit() else name)
        return {"tensor": len(leaves) - 1}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {
            "record": {
                name: inside(name, item) for name, item in (value.items() if isinstance(value, dict) else fields)
            }
        }
    if isinstance(value, dict):
        return {"dict": [[key, inside(key, item)] for key, item in value.items()]}
    if isinstance(value, tuple) and (fields_of_tuple := _fields_of(value)):
        return {"named_tuple": {name: inside(name, getattr(value, name)) for name in fields_of_tuple}}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [inside(index, item) for index, item in enumerate(value)]}
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise ExportError("Expected forward to return tensors, but it returns a number computed from a dynamic shape.")
    if value is None or isinstance(value, bool | int | float | str):
        return {"constant": plain(value)}
    if any((base.__name__, base.__module__) == ("Cache", "transformers.cache_utils") for base in type(value).__mro__):
        # Keys and values for a next call: code that generates has its own, and an artifact is called once at a time.
        return {"constant": None}
    raise ExportError(
        f"Expected forward to return tensors in lists, dicts or dataclasses, but got {type(value).__name__}. "
        "Quantize a child module that returns tensors; callbacks take its name as `module=...`."
    )


def build(structure: Any, tensors: list[Tensor]) -> Any:
    """Return the result that a description and its tensors make up."""
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "constant":
        return decode(content)
    if kind == "record":
        return Record({name: build(item, tensors) for name, item in content.items()})
    if kind == "named_tuple":
        return _named_tuple(tuple(content))(*(build(item, tensors) for item in content.values()))
    if kind == "dict":
        return {key: build(item, tensors) for key, item in content}
    items = [build(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def indices(structure: Any) -> list[int]:
    """Return the outputs that a result is made of, in order; raise unless `build` can build it."""
    ((kind, content),) = structure.items()
    if kind == "tensor":
        if type(content) is not int:
            raise TypeError(f"{content!r} is no index")
        return [content]
    if kind == "constant":
        decode(content)
        return []
    if kind in ("record", "named_tuple"):
        items = [content[text(name)] for name in content]
        if kind == "named_tuple":
            _named_tuple(tuple(content))
    elif kind == "dict":
        items = [item for _, item in content]
        if not all(key is None or isinstance(key, bool | int | float | str) for key, _ in content):
            raise TypeError("a key of a dict is no plain value")
    elif kind in ("list", "tuple"):
        items = list(content)
    else:
        raise ValueError(f"{kind!r} is no kind of result")
    return [index for item in items for index in indices(item)]


def _fields_of(value: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the names of a named tuple's fields, of what `torch.max(x, 1)` returns, too; none of any other tuple."""
    names: tuple[str, ...] = getattr(value, "_fields", ()) or getattr(value, "__match_args__", ())
    return names if len(names) == len(value) else ()


@functools.cache
def _named_tuple(names: tuple[str, ...]) -> type[tuple[Any, ...]]:
    """Return a class of tuples with these fields, as results of one structure share it.

    They are read by key, too, as results of PyTorch Forecasting are.
    """
    made = cast(Any, collections.namedtuple)("Result", names)
    of_mappings: dict[str, Callable[..., Any]] = {
        "__getitem__": lambda self, key: getattr(self, key) if key in names else tuple.__getitem__(self, key),
        "keys": lambda self: self._fields,
        "items": lambda self: self._asdict().items(),
        "get": lambda self, key, default=None: getattr(self, key) if key in names else default,
    }
    for name, method in of_mappings.items():
        if name not in names:
            setattr(made, name, method)
    return made


def text(value: Any) -> str:
    """Return a name that was read, or raise."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is no name")
    return value


def plain(value: Any) -> Any:
    """Return a value that JSON can hold: infinities and NaN, which it has no numbers for, by name."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def decode(value: Any) -> Any:
    """Return the value that `plain` wrote."""
    if isinstance(value, dict) and set(value) == {"float"}:
        return float(value["float"])
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} is no plain value")


def freeze(value: Any) -> Any:
    """Return a nested value that `plain` wrote, with tuples for lists."""
    if isinstance(value, list):
        return tuple(freeze(item) for item in value)
    if isinstance(value, dict) and set(value) != {"float"}:
        return {key: freeze(item) for key, item in value.items()}
    return decode(value)
