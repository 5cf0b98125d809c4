"""Arguments that all doors of the package share, checked where they are written and not where they are used."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from torch import nn

from lightning_quant.arguments.choice import did_you_mean
from lightning_quant.errors import QuantizationError

T = TypeVar("T")


def from_fields(kind: type[T], argument: str, values: Mapping[str, Any]) -> T:
    """Build a dataclass from what a user wrote as a dict.

    Raises:
        QuantizationError: it has no such field, or a field's value is wrong.
    """
    check_fields(argument, values, [item.name for item in fields(kind)])  # type: ignore[arg-type]
    return kind(**values)


def check_fields(argument: str, values: Mapping[Any, Any], known: Iterable[str]) -> None:
    """Make sure that a dict has no other keys than those known.

    Raises:
        QuantizationError: it has; the message has the closest.
    """
    names = sorted(known)
    unknown = [key for key in values if key not in names]
    if unknown:
        hint = did_you_mean(unknown[0], names)
        raise QuantizationError(f"Expected `{argument}` to have fields out of {names}, but got {unknown}.{hint}")


def patterns(argument: str, value: Any) -> tuple[str, ...]:
    """Return fnmatch patterns as a tuple; one alone is taken as such, and a class of layers by its name.

    Raises:
        QuantizationError: something else is among them.
    """
    several = (value,) if isinstance(value, str | type | nn.Module) or not isinstance(value, Iterable) else value
    return tuple(_pattern(argument, item) for item in several)


def _pattern(argument: str, item: Any) -> str:
    if isinstance(item, type):
        return item.__name__
    if not isinstance(item, str) or not item:
        got = "the layer itself" if isinstance(item, nn.Module) else f"{item!r:.60}"
        raise QuantizationError(
            f"Expected `{argument}` to hold patterns on names or layer types, as ['head', 'Linear'], but got {got}."
        )
    return item


def check_flag(argument: str, value: Any) -> None:
    """Make sure that a switch is True or False, and not a text, which would count as True."""
    if not isinstance(value, bool):
        raise QuantizationError(f"Expected `{argument}` to be True or False, but got {value!r:.60}.")


def check_positive(argument: str, value: Any, otherwise: str = "") -> None:
    """Make sure that a value is a whole number above zero."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise QuantizationError(f"Expected `{argument}` to be a positive integer{otherwise}, but got {value!r:.60}.")


def check_number(argument: str, value: Any, least: float = 0, most: float = math.inf) -> None:
    """Make sure that a value is a number in a closed interval."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        span = f"{least:g} or more" if most == math.inf else f"in [{least:g}, {most:g}]"
        raise QuantizationError(f"Expected `{argument}` to be {span}, but got {value!r:.60}.")


def check_texts(argument: str, value: Any, example: str) -> None:
    """Make sure that a value is a list or tuple of names, and not a single one, which would be its letters."""
    if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
        raise QuantizationError(f"Expected `{argument}` to be a list of names as {example}, but got {value!r:.60}.")


def check_threads(value: Any) -> None:
    """Make sure that a number of threads is one, or None."""
    if value is not None:
        check_positive("threads", value, " or None")


def check_limit(argument: str, value: Any) -> None:
    """Make sure that a limit of batches is a number or a share of them, or None."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    share = isinstance(value, float) and 0 < value <= 1
    if value is not None and not whole and not share:
        is_evaluation = argument == "limit_eval_batches"
        way_out = " To leave evaluation out: `evaluate=False`." if value == 0 and is_evaluation else ""
        raise QuantizationError(
            f"Expected `{argument}` to be a number of batches from 1, or a share of them in (0.0, 1.0], but got "
            f"{value!r:.60}.{way_out}"
        )


def check_path(argument: str, value: Any) -> None:
    """Make sure that a value is a path, or None."""
    if value is not None and (not isinstance(value, str | os.PathLike) or not os.fspath(value)):
        raise QuantizationError(f"Expected `{argument}` to be the path of a folder, but got {value!r:.60}.")


def check_name(argument: str, value: Any, of: str) -> None:
    """Make sure that a module is given by its name, or None."""
    if value is not None and not isinstance(value, str):
        what = f"the {type(value).__name__} itself" if isinstance(value, nn.Module) else f"{value!r:.60}"
        raise QuantizationError(
            f"Expected `{argument}` to be the name of a module, as `named_modules()` of {of} has it, but got {what}: "
            f'for `self.net` write `{argument}="net"`.'
        )


def check_key(argument: str, value: Any) -> None:
    """Make sure that a name can stand in a logger's keys, or is None."""
    if value is None or (isinstance(value, str) and value and all(c.isalnum() or c in "-_.+" for c in value)):
        return
    raise QuantizationError(
        f"Expected `{argument}` to be a text of letters, digits, '-', '_', '.' and '+' for keys such as "
        f"'quant/{argument}/size_ratio', but got {value!r:.60}."
    )


def check_on_device(module: nn.Module) -> None:
    """Make sure that a module's weights exist, which those on the meta device do not.

    Raises:
        QuantizationError: one does not.
    """
    tensors = (*module.named_parameters(), *module.named_buffers())
    empty = next((name for name, tensor in tensors if tensor.is_meta), None)
    if empty is not None:
        raise QuantizationError(
            f"Expected a module with weights, but {empty!r} is on the meta device, without any. Fill it first: "
            "`module.to_empty(device='cpu')` and `module.load_state_dict(...)`."
        )
