"""What a report says of its artifact in one line, for commands that compare several."""

from collections.abc import Mapping
from typing import Any

from lightning_quant.artifact.artifact import Artifact
from lightning_quant.report.limits import cell, delta_of, speedups_of

SCHEMA_VERSION = 1
"""Of the JSON that the command line prints; a key that goes or changes its meaning makes another."""


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
                "float": row.get("float_value"),
                "artifact": row.get("artifact"),
                "delta": delta_of(row),
                "margin": row.get("margin"),
                "higher_is_better": row.get("higher_is_better"),
            }
            for row in report.get("metrics", [])
        },
        "speedup": speedups_of(report),
        "warnings": report.get("warnings", []),
    }


def columns(summary: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return heading to cell of a table of summaries; headings are in two parts, so that no metric hides another."""
    cells = {("", name): summary[name] for name in ("artifact", "recipe", "runtime", "bytes", "size_ratio", "coverage")}
    for name, values in summary["metrics"].items():
        cells |= {("metric", name): values["artifact"], ("delta", f"{name} - float"): values["delta"]}
    cells |= {("speedup", f"times faster, batch {batch}"): value for batch, value in summary["speedup"].items()}
    return {heading: cell(value) for heading, value in cells.items()}
