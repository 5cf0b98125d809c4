"""What a manifest may say was measured: commands compute with these values, whoever wrote them."""

from collections.abc import Callable
from typing import Any

# What JSON has no numbers for is written as text.
_NO_NUMBERS = ("inf", "-inf", "nan")
_MAX_THREADS, _MAX_BATCH = 2**12, 2**20


def is_report(value: Any) -> bool:
    """Tell whether a value is a report as far as anything here reads it; parts of one may be missing."""
    return isinstance(value, dict) and all(fits(value[name]) for name, fits in _PARTS.items() if name in value)


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value in _NO_NUMBERS


def _is_count(most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _optional(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _are(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _has(parts: dict[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    """Return a test for dicts with these parts among others; a missing one counts as None."""
    return lambda value: isinstance(value, dict) and all(fits(value.get(name)) for name, fits in parts.items())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_METRIC = {
    "name": _is_text,
    "float_value": _optional(_is_number),
    "artifact": _optional(_is_number),
    "before": _optional(_is_number),
    "higher_is_better": _optional(lambda value: isinstance(value, bool)),
}
_TIMING = _has({"median_ms": lambda value: isinstance(value, float) and value > 0})
_LATENCY = {
    "batch": _is_count(_MAX_BATCH),
    "torch_float": _TIMING,
    "runtime_float": _optional(_TIMING),
    # Reports of earlier versions have none.
    "elsewhere": _optional(lambda value: isinstance(value, dict) and all(map(_TIMING, value.values()))),
}
_PARTS: dict[str, Callable[[Any], bool]] = {
    "warnings": _are(_is_text),
    "size_ratio": _optional(_is_number),
    "float_bytes": _optional(_is_number),
    "threads": _is_count(_MAX_THREADS),
    "cpu": _is_text,
    "scalars": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "metrics": _are(_has(_METRIC)),
    "latency": _are(_has(_LATENCY)),
}


def best_float_ms(row: dict[str, Any]) -> float:
    """Return the median of the fastest float peer in a row of latencies."""
    peers = [row["torch_float"], row.get("runtime_float"), *(row.get("elsewhere") or {}).values()]
    return min(float(peer["median_ms"]) for peer in peers if peer is not None)
