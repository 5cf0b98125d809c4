"""Limits by the name of what they are on, `{"val_acc": -0.005, "size_ratio": 0.3}`, as fields of `Limits`.

Of a metric that is the change that is allowed, in its worse direction: -0.005 lets it fall by so much, 0.01 rise. So
the sign says which direction is worse, and a metric whose callbacks say otherwise is refused.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from lightning_quant.arguments.choice import closest, did_you_mean
from lightning_quant.errors import QuantizationError

BOUNDS = {
    "size_ratio": "max_size_ratio",
    "size_bytes": "max_size_bytes",
    "speedup": "min_speedup",
    "latency_ms": "max_latency_ms",
    "peak_memory_mb": "max_peak_memory_mb",
    "peak_memory_ratio": "max_peak_memory_ratio",
}
"""Name of what there is to bound beside metrics to the field that bounds it."""
EXAMPLE = {"val_f1": -0.01, "size_ratio": 0.3}


def are_by_name(given: Any, known: Collection[str]) -> bool:
    """Tell whether limits are by the names of what they are on, some of them at least.

    Args:
        given: what a user wrote.
        known: fields of `Limits`.
    """
    return isinstance(given, Mapping) and any(name in BOUNDS or name not in known for name in given)


def as_fields(given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return the fields that limits by name mean.

    Raises:
        QuantizationError: a name or a value is none, or a field is misspelt.
    """
    fields = {name: value for name, value in given.items() if name in known}
    fields["max_drop"] = dict(fields.get("max_drop", {}))
    said: dict[bool, list[str]] = {True: [], False: []}
    for name, value in given.items():
        if name in known:
            continue
        _check(name, value, known)
        if name in BOUNDS:
            fields[BOUNDS[name]] = _positive(name, value)
            continue
        fields["max_drop"][name] = abs(float(value))
        if value:
            said[value < 0].append(name)
    for higher, name in ((True, "higher_is_better"), (False, "lower_is_better")):
        fields[name] = [*fields.get(name, []), *said[higher]]
    return fields


def _check(name: Any, value: Any, known: Collection[str]) -> None:
    if not isinstance(name, str):
        raise QuantizationError(f"Expected `limits` to be a dict such as {EXAMPLE}, but it has the key {name!r:.60}.")
    if name not in BOUNDS and closest(name, [*known, *BOUNDS], cutoff=0.8):
        hint = did_you_mean(name, [*known, *BOUNDS])
        raise QuantizationError(f"Expected `limits` on metrics or {sorted(BOUNDS)}, but got {name!r}.{hint}")
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise QuantizationError(f"Expected `limits.{name}` to be a number, but got {value!r:.60}.")


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise QuantizationError(f"Expected `limits.{name}` to be above zero, but got {value!r}: nothing keeps to it.")
    return value


def other_directions(directions: Mapping[str, bool | None], said: Mapping[str, bool]) -> list[str]:
    """Return in words the limits that allow a metric to get better and not worse.

    Args:
        directions: metric to whether it is better when higher, where that is known.
        said: the same as the limits have it.
    """
    return [
        f"`limits` allow {name} to {'fall' if higher else 'rise'}, but it is better when "
        f"{'lower' if higher else 'higher'}: write {'+' if higher else '-'}, the change in its worse direction"
        for name, higher in said.items()
        if directions.get(name) is not None and directions[name] != higher
    ]
