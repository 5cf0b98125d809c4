"""What an artifact's report says in one line, and which limits it misses."""

from typing import Any

from lightning_quant.artifact import Artifact

_SPEEDUP = "quant/speedup/batch_"


def missed_limits(
    artifact: Artifact, max_accuracy_drop: float | None, max_size_ratio: float | None, min_speedup: float | None
) -> list[str]:
    """Return what an artifact's report says FAILED, and every limit that it misses or says nothing about.

    Args:
        artifact: with its report.
        max_accuracy_drop: of every metric with "acc" in its name, float minus artifact.
        max_size_ratio: of artifact to float, in bytes.
        min_speedup: against the faster float peer, at every measured batch size.
    """
    report = artifact.report or {}
    missed = failures_in(report)
    if max_accuracy_drop is not None:
        drops = {name: -delta for name, delta in _deltas(report).items() if "acc" in name.lower()}
        for name, drop in drops.items():
            if not drop <= max_accuracy_drop:
                missed.append(f"{name} fell by {drop:.4f}, more than {max_accuracy_drop}")
        if not drops:
            missed.append("no metric with `acc` in its name was measured, so none is known to keep within the limit")
    if max_size_ratio is not None:
        ratio = report.get("size_ratio")
        if ratio is None:
            missed.append("no size ratio was measured")
        elif not ratio <= max_size_ratio:
            missed.append(f"its size ratio is {cell(ratio)}, more than {max_size_ratio}")
    if min_speedup is not None:
        speedups = _speedups(report)
        for batch, value in speedups.items():
            if not value >= min_speedup:
                missed.append(f"at batch {batch} it is {value:.2f} times as fast as float, less than {min_speedup}")
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
    """Return name to value of what one compares artifacts by."""
    report = artifact.report or {}
    return {
        "artifact": str(artifact.path),
        "recipe": artifact.manifest["recipe"],
        "runtime": artifact.manifest["runtime"],
        "bytes": artifact.size_bytes,
        "size_ratio": report.get("size_ratio"),
        "coverage": artifact.plan["coverage"],
        **{row["name"]: row["artifact"] for row in report.get("metrics", [])},
        **{f"{name} - float": delta for name, delta in _deltas(report).items()},
        **{f"speedup, batch {batch}": value for batch, value in _speedups(report).items()},
    }


def cell(value: Any) -> str:
    """Return a value as it stands in a table."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _deltas(report: dict[str, Any]) -> dict[str, float]:
    rows = report.get("metrics", [])
    known = [r for r in rows if isinstance(r["artifact"], int | float) and isinstance(r["float_value"], int | float)]
    return {row["name"]: row["artifact"] - row["float_value"] for row in known}


def _speedups(report: dict[str, Any]) -> dict[str, float]:
    scalars = report.get("scalars", {})
    return {key.removeprefix(_SPEEDUP): value for key, value in scalars.items() if key.startswith(_SPEEDUP)}
