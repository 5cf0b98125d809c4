"""What an artifact must keep to, and what its report says in one line."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_quant.artifact import Artifact
from lightning_quant.choice import did_you_mean
from lightning_quant.errors import QuantizationError

SCHEMA_VERSION = 1
"""Of the JSON that the command line prints; a key that goes or changes its meaning makes another."""
_SPEEDUP = "quant/speedup/batch_"


@dataclass(frozen=True)
class Limits:
    """What the report of an artifact is held against; a limit on what was not measured is missed.

    Attributes:
        max_drop: metric to by how much it may get worse than float, in its own unit: fall where higher is better, rise
            where lower is.
        max_accuracy_drop: by how much every metric with "acc" in its name may fall.
        max_size_ratio: of artifact to float, in bytes.
        min_speedup: against the faster float peer, at every measured batch size.
        higher_is_better: metrics of which neither torchmetrics nor a ModelCheckpoint or EarlyStopping says so.
        lower_is_better: likewise.
    """

    max_drop: dict[str, float] = field(default_factory=dict)
    max_accuracy_drop: float | None = None
    max_size_ratio: float | None = None
    min_speedup: float | None = None
    higher_is_better: list[str] = field(default_factory=list)
    lower_is_better: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        ratios = {"max_accuracy_drop": self.max_accuracy_drop, "max_size_ratio": self.max_size_ratio}
        values = {**ratios, "min_speedup": self.min_speedup, **{f"max_drop.{k}": v for k, v in self.max_drop.items()}}
        for name, value in values.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
            if value is not None and not is_number:
                raise QuantizationError(f"Expected `limits.{name}` to be a number, but got {value!r:.60}.")
        both = sorted({*self.higher_is_better} & {*self.lower_is_better})
        if both:
            raise QuantizationError(f"Expected metrics to be better when higher or when lower, but {both} is both.")


def missed_limits(artifact: Artifact, limits: Limits) -> list[str]:
    """Return what an artifact's report says FAILED, and every limit that it misses or says nothing about."""
    report = artifact.report or {}
    missed = [*failures_in(report), *_metrics_missed(report, limits)]
    if limits.max_size_ratio is not None:
        ratio = report.get("size_ratio")
        if ratio is None:
            missed.append("no size ratio was measured")
        elif not ratio <= limits.max_size_ratio:
            missed.append(f"its size ratio is {cell(ratio)}, more than {limits.max_size_ratio}")
    if limits.min_speedup is not None:
        speedups = _speedups(report)
        for batch, value in speedups.items():
            if not value >= limits.min_speedup:
                missed.append(
                    f"at batch {batch} it is {value:.2f} times as fast as float, less than {limits.min_speedup}"
                )
        if not speedups:
            missed.append("no speed-up was measured")
    return [f"{artifact.path}: {text}" for text in missed]


def failures_in(report: dict[str, Any]) -> list[str]:
    """Return what a report says FAILED: its parity, or its recipe."""
    found = [text for text in report.get("warnings", []) if " FAILED" in text]
    if report.get("scalars", {}).get("quant/parity_failed") and not any("parity" in text for text in found):
        found.append("parity FAILED")
    return found


def summary(artifact: Artifact) -> dict[str, Any]:
    """Return what one compares artifacts by; the user's own metrics have a level of their own."""
    report = artifact.report or {}
    return {
        "schema_version": SCHEMA_VERSION,
        "artifact": str(artifact.path),
        "recipe": artifact.manifest["recipe"],
        "runtime": artifact.manifest["runtime"],
        "bytes": artifact.size_bytes,
        "float_bytes": report.get("float_bytes"),
        "size_ratio": report.get("size_ratio"),
        "coverage": artifact.plan["coverage"],
        "metrics": {
            row["name"]: {
                "float": row["float_value"],
                "artifact": row["artifact"],
                "delta": _delta(row),
                "higher_is_better": row.get("higher_is_better"),
            }
            for row in report.get("metrics", [])
        },
        "speedup": _speedups(report),
        "warnings": report.get("warnings", []),
    }


def columns(summary: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return heading to cell of a table of summaries; headings are in two parts, so that no metric hides another."""
    cells = {("", name): summary[name] for name in ("artifact", "recipe", "runtime", "bytes", "size_ratio", "coverage")}
    for name, values in summary["metrics"].items():
        cells |= {("metric", name): values["artifact"], ("delta", f"{name} - float"): values["delta"]}
    cells |= {("speedup", f"times faster, batch {batch}"): value for batch, value in summary["speedup"].items()}
    return {heading: cell(value) for heading, value in cells.items()}


def cell(value: Any) -> str:
    """Return a value as it stands in a table."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _metrics_missed(report: dict[str, Any], limits: Limits) -> Iterator[str]:
    rows = {row["name"]: row for row in report.get("metrics", [])}
    for name, allowed in limits.max_drop.items():
        if name not in rows:
            there = f": there are {', '.join(rows)}" if rows else ""
            yield f"no metric {name!r} was measured{there}.{did_you_mean(name, rows)}"
        else:
            yield from _worse(rows[name], allowed, _direction(rows[name], limits))
    if limits.max_accuracy_drop is not None:
        accuracies = [row for name, row in rows.items() if "acc" in name.lower() and _delta(row) is not None]
        for row in accuracies:
            yield from _worse(row, limits.max_accuracy_drop, True)
        if not accuracies:
            yield "no metric with `acc` in its name was measured, so none is known to keep within the limit"


def _worse(row: dict[str, Any], allowed: float, higher_is_better: bool | None) -> Iterator[str]:
    name, delta = row["name"], _delta(row)
    if delta is None:
        yield f"{name} was not measured of float and artifact, so it is not known to keep within the limit"
    elif higher_is_better is None:
        yield (
            f"it is not known whether {name} is better when it is higher: say `--higher-is-better {name}` or "
            f"`--lower-is-better {name}`"
        )
    elif not (-delta if higher_is_better else delta) <= allowed:
        how = f"fell by {-delta:.4f}" if higher_is_better else f"rose by {delta:.4f}"
        yield f"{name} {how}, more than {allowed}"


def _direction(row: dict[str, Any], limits: Limits) -> bool | None:
    if row["name"] in limits.higher_is_better or row["name"] in limits.lower_is_better:
        return row["name"] in limits.higher_is_better
    return row.get("higher_is_better")


def _delta(row: dict[str, Any]) -> float | None:
    values = (row["artifact"], row["float_value"])
    return values[0] - values[1] if all(isinstance(value, int | float) for value in values) else None


def _speedups(report: dict[str, Any]) -> dict[str, float]:
    scalars = report.get("scalars", {})
    return {key.removeprefix(_SPEEDUP): value for key, value in scalars.items() if key.startswith(_SPEEDUP)}
