"""What an artifact must keep to, and what of that its report says is missed."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_quant.arguments.choice import closest
from lightning_quant.arguments.keywords import known_arguments
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.errors import QuantizationError
from lightning_quant.report.limit_names import EXAMPLE, are_by_name, as_fields
from lightning_quant.terminal.figures import fixed

_SPEEDUP = "quant/speedup/batch_"
_LATENCY = "quant/latency_ms/batch_"
# What the drop of a metric looks like, for those who write another thing.
_DROP = {"val_f1": 0.01}
_MEMORY_BOUNDS = ("max_peak_memory_mb", "max_peak_memory_ratio")
_BOUNDS = ("max_size_ratio", "min_speedup", "max_size_bytes", "max_latency_ms", *_MEMORY_BOUNDS)
_SINGLE = ("max_accuracy_drop", *_BOUNDS)
_MEMORY = "quant/peak_memory_"


def _check_names(argument: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise QuantizationError(
            f"Expected `limits.{argument}` to be a list of metrics such as ['val_f1'], but got {value!r:.60}."
        )


@known_arguments
@dataclass(frozen=True)
class Limits:
    """What the report of an artifact is held against; a limit on what was not measured is missed.

    Attributes:
        max_drop: metric to by how much it may get worse than float, in its own unit: fall where higher is better, rise
            where lower is. After training through rounding: than the trained weights without rounding, and than the
            last validation before rounding began.
        max_accuracy_drop: by how much every metric with "acc" in its name may fall.
        max_size_ratio: of artifact to float, in bytes.
        min_speedup: against the faster float peer, at every measured batch size.
        max_size_bytes: of the artifact's model files.
        max_latency_ms: of one call, at every measured batch size.
        max_peak_memory_mb: memory, in units of 2**20 bytes, that a process of its own takes at its peak for loading the
            artifact and for a call of it, on top of what it had with torch alone.
        max_peak_memory_ratio: the same by that of a process for the float model in the runtime's own format.
        higher_is_better: metrics of which neither torchmetrics nor a ModelCheckpoint or EarlyStopping says so.
        lower_is_better: likewise.
    """

    max_drop: dict[str, float] = field(default_factory=dict)
    max_accuracy_drop: float | None = None
    max_size_ratio: float | None = None
    min_speedup: float | None = None
    higher_is_better: list[str] = field(default_factory=list)
    lower_is_better: list[str] = field(default_factory=list)
    max_size_bytes: float | None = None
    max_latency_ms: float | None = None
    max_peak_memory_mb: float | None = None
    max_peak_memory_ratio: float | None = None

    def __post_init__(self) -> None:
        for name in ("higher_is_better", "lower_is_better"):
            _check_names(name, getattr(self, name))
        if not isinstance(self.max_drop, Mapping) or not all(isinstance(name, str) for name in self.max_drop):
            got = self.max_drop
            raise QuantizationError(f"Expected `limits.max_drop` to be a dict such as {_DROP}, but got {got!r:.60}.")
        single = {name: getattr(self, name) for name in _SINGLE}
        values = {**single, **{f"max_drop.{k}": v for k, v in self.max_drop.items()}}
        for name, value in values.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
            is_number |= value is None and "." not in name
            if not is_number:
                raise QuantizationError(f"Expected `limits.{name}` to be a number, but got {value!r:.60}.")
        both = sorted({*self.higher_is_better} & {*self.lower_is_better})
        if both:
            raise QuantizationError(
                f"Expected `limits` to be on metrics better when higher or when lower, but {both} is both."
            )

    @property
    def on_metrics(self) -> bool:
        """Whether validation has to run to know whether they are kept."""
        return bool(self.max_drop) or self.max_accuracy_drop is not None

    @property
    def on_memory(self) -> bool:
        """Whether a process of its own has to be measured."""
        return any(getattr(self, name) is not None for name in _MEMORY_BOUNDS)


NO_LIMITS = Limits()
_FIELDS = [field.name for field in fields(Limits)]


def limits_from(given: "Limits | Mapping[str, Any] | None") -> Limits:
    """Return the limits that an argument means: none, some, a dict of the fields of `Limits`, or one by name.

    Raises:
        QuantizationError: it is something else, or one of the fields is no limit.
    """
    if given is None or isinstance(given, Limits):
        return given or NO_LIMITS
    if not isinstance(given, Mapping):
        raise QuantizationError(f"Expected `limits` to be a dict such as {EXAMPLE}, but got {given!r:.60}.")
    return Limits(**(as_fields(given, _FIELDS) if is_search(given) else given))


def is_search(given: Any) -> bool:
    """Tell whether limits are by the names of what they are on, and so ask for a search of what keeps them."""
    return are_by_name(given, _FIELDS)


def check_measured(limits: Limits, why_not: str) -> None:
    """Refuse limits on metrics where no validation runs.

    Args:
        limits: what the artifact is to keep to.
        why_not: why none runs, and the way out.

    Raises:
        QuantizationError: there are such limits.
    """
    if limits.on_metrics:
        raise QuantizationError(f"Expected `limits` on metrics only where validation runs, but {why_not}.")


def unlogged(limits: Limits, logged: Iterable[str]) -> str:
    """Say which limits are on metrics that validation has not logged; empty where there are none."""
    names = list(logged)
    absent = [name for name in limits.max_drop if name not in names]
    if not absent:
        return ""
    return f"`limits` are on {', '.join(absent)}, which validation has not logged{_but(absent[0], names)}"


def _but(name: str, names: Iterable[str]) -> str:
    """Say in words which metrics there are, and which one was probably meant."""
    meant = "".join(f"; {close!r} was probably meant" for close in closest(name, names)[:1])
    return f", but {', '.join(names)}{meant}" if names else ""


def missed_limits(artifact: Artifact, limits: Limits) -> list[str]:
    """Return what an artifact's report says FAILED, and every limit that it misses or says nothing about."""
    report = artifact.report or {}
    return [f"{artifact.path}: {text}" for text in (*failures_in(report), *missed(report, limits))]


def missed(report: Mapping[str, Any], limits: Limits) -> list[str]:
    """Return in words every limit that a report misses or says nothing about.

    Args:
        report: with the "metrics", "size_ratio" and "scalars" of `Report.to_dict`.
        limits: what it is held against.
    """
    lines = list(_metrics_missed(report, limits))
    if limits.max_size_ratio is not None:
        ratio = report.get("size_ratio")
        if ratio is None:
            lines.append("no size ratio was measured")
        elif not float(ratio) <= limits.max_size_ratio:
            lines.append(f"its size ratio is {cell(ratio)}, more than {limits.max_size_ratio}")
    lines += _bytes_missed(report, limits)
    lines += _latency_missed(report, limits)
    lines += _memory_missed(report, limits)
    if limits.min_speedup is not None:
        speedups = speedups_of(report)
        for batch, value in speedups.items():
            if not value >= limits.min_speedup:
                lines.append(
                    f"at batch {batch} it is {value:.2f} times as fast as float, less than {limits.min_speedup}"
                )
        if not speedups:
            lines.append("no speed-up was measured")
    return lines


def _bytes_missed(report: Mapping[str, Any], limits: Limits) -> Iterator[str]:
    reached = report.get("artifact_bytes")
    if limits.max_size_bytes is None:
        return
    if reached is None:
        yield "its bytes were not measured"
    elif reached > limits.max_size_bytes:
        yield f"it has {reached:,} bytes, more than {limits.max_size_bytes:,}"


def _latency_missed(report: Mapping[str, Any], limits: Limits) -> Iterator[str]:
    if limits.max_latency_ms is None:
        return
    reached = _by_batch(report, _LATENCY)
    for batch, value in reached.items():
        if not value <= limits.max_latency_ms:
            yield f"at batch {batch} a call takes {value:.3g} ms, more than {limits.max_latency_ms}"
    if not reached:
        yield "no latency was measured"


def _memory_missed(report: Mapping[str, Any], limits: Limits) -> Iterator[str]:
    scalars = report.get("scalars", {})
    peak, ratio = scalars.get(f"{_MEMORY}mb"), scalars.get(f"{_MEMORY}ratio")
    if peak is None and limits.on_memory:
        yield "no peak of memory was measured"
        return
    if limits.max_peak_memory_mb is not None and not peak <= limits.max_peak_memory_mb:
        yield f"a process takes {peak:.1f} MiB at its peak, more than {limits.max_peak_memory_mb}"
    if limits.max_peak_memory_ratio is not None:
        if ratio is None:
            yield "no peak of memory of float was measured"
        elif not ratio <= limits.max_peak_memory_ratio:
            yield f"a process takes {ratio:.3f} of float's memory at its peak, more than {limits.max_peak_memory_ratio}"


def failures_in(report: dict[str, Any]) -> list[str]:
    """Return what a report says FAILED: its parity, or its recipe."""
    lines = [text for text in report.get("warnings", []) if " FAILED" in text]
    if report.get("scalars", {}).get("quant/parity_failed") and not any("parity" in text for text in lines):
        lines.append("parity FAILED")
    return lines


def cell(value: Any) -> str:
    """Return a value as it stands in a table."""
    if isinstance(value, float):
        return fixed(value)
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _metrics_missed(report: Mapping[str, Any], limits: Limits) -> Iterator[str]:
    rows = {row["name"]: row for row in report.get("metrics", [])}
    for name, allowed in limits.max_drop.items():
        if name not in rows:
            yield f"no metric {name!r} was measured{_but(name, rows)}"
        else:
            yield from _worse(rows[name], allowed, _direction(rows[name], limits))
    if limits.max_accuracy_drop is not None:
        accuracies = [row for name, row in rows.items() if "acc" in name.lower() and delta_of(row) is not None]
        for row in accuracies:
            yield from _worse(row, limits.max_accuracy_drop, True)
        if not accuracies:
            yield "no metric with `acc` in its name was measured, so none is known to keep within the limit"


def _worse(row: Mapping[str, Any], allowed: float, higher_is_better: bool | None) -> Iterator[str]:
    yield from _worse_than_float(row, allowed, higher_is_better)
    before = row.get("before")
    if (
        isinstance(before, int | float)
        and higher_is_better is not None
        and isinstance(row.get("artifact"), int | float)
    ):
        delta = row["artifact"] - before
        if not (-delta if higher_is_better else delta) <= allowed:
            how = "fell" if higher_is_better else "rose"
            yield f"{row['name']} {how} by {fixed(abs(delta), before)} since rounding began, more than {allowed}"


def _worse_than_float(row: Mapping[str, Any], allowed: float, higher_is_better: bool | None) -> Iterator[str]:
    name, delta = row["name"], delta_of(row)
    if delta is None:
        yield f"{name} was not measured of float and artifact, so it is not known to keep within the limit"
    elif higher_is_better is None:
        yield (
            f"it is not known whether {name} is better when it is higher: say so in `higher_is_better` or "
            f"`lower_is_better` of the limits (`--higher-is-better {name}`)"
        )
    elif not (-delta if higher_is_better else delta) <= allowed:
        how = f"{'fell' if higher_is_better else 'rose'} by {fixed(abs(delta), row.get('float_value'))}"
        yield f"{name} {how}, more than {allowed}"


def _direction(row: Mapping[str, Any], limits: Limits) -> bool | None:
    if row["name"] in limits.higher_is_better or row["name"] in limits.lower_is_better:
        return row["name"] in limits.higher_is_better
    return row.get("higher_is_better")


def delta_of(row: Mapping[str, Any]) -> float | None:
    """Return what a metric of the artifact is minus that of float; None where one was not measured."""
    artifact, floating = row.get("artifact"), row.get("float_value")
    return artifact - floating if isinstance(artifact, int | float) and isinstance(floating, int | float) else None


def speedups_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Return batch size to how many times as fast as float."""
    return _by_batch(report, _SPEEDUP)


def _by_batch(report: Mapping[str, Any], prefix: str) -> dict[str, float]:
    scalars = report.get("scalars", {})
    return {key.removeprefix(prefix): float(value) for key, value in scalars.items() if key.startswith(prefix)}
