"""Which feature of Lightning a test shows to hold; tests/README.md lists them all."""

from typing import Any

import pytest

Row = dict[str, str]
# Tests of the callbacks that a session has collected, slow ones included.
SHOWN = pytest.StashKey[list[Any]]()


def feature(group: str, name: str, *, only: str = "", refused: str = "", needs: str = "", note: str = "") -> Any:
    """Mark a test with the row of the table that it is the evidence for.

    Args:
        group: heading of the row.
        name: of the feature.
        only: "QAT", "PTQ" or "both" for a test that has no parameter `kind`, which says so by itself.
        refused: the reason, where the test shows that the feature is refused before training.
        needs: what the test is skipped without; the table then does not call the feature verified.
        note: what else a reader should know.
    """
    return pytest.mark.feature(group, name, only=only, refused=refused, needs=needs, note=note)


def rows_of(items: list[Any]) -> list[Row]:
    """Return what the collected tests show: one entry per feature, callback and test."""
    rows = []
    for item in items:
        for marker in item.iter_markers("feature"):
            group, name = marker.args
            for callback in _callbacks(item, marker.kwargs["only"]):
                refused, note = marker.kwargs["refused"], marker.kwargs["note"]
                needs = marker.kwargs["needs"]
                result = f"refused: {refused}" if refused else f"not verified: needs {needs}" if needs else "verified"
                suite = "slow" if item.get_closest_marker("slow") else ""
                test = f"{item.path.name}::{item.originalname}"
                rows.append(
                    {"group": group, "name": name, "callback": callback, "result": result, "note": note, "suite": suite}
                    | {"test": test}
                )
    return rows


def _callbacks(item: Any, only: str) -> list[str]:
    kind = item.callspec.params.get("kind") if hasattr(item, "callspec") else None
    if kind is not None:
        return [{"QuantizationAwareTraining": "QAT", "PostTrainingQuantization": "PTQ"}[kind.__name__]]
    if only not in ("QAT", "PTQ", "both"):
        raise ValueError(f"{item.nodeid} has no parameter `kind`, so its feature must say which callback it is about.")
    return ["QAT", "PTQ"] if only == "both" else [only]


def table(rows: list[Row]) -> str:
    """Return the table in Markdown, grouped by heading, in the order of the test files."""
    groups: dict[str, dict[str, dict[str, set[str]]]] = {}
    for row in rows:
        entry = groups.setdefault(row["group"], {}).setdefault(row["name"], {})
        entry.setdefault(row["callback"], set()).add(row["result"])
        entry.setdefault("tests", set()).add(f"`{row['test']}`" + (" (slow)" if row["suite"] else ""))
        if row["note"]:
            entry.setdefault("note", set()).add(row["note"])
    parts = []
    for group in sorted(groups):
        lines = [f"### {group}", "", "| feature | QAT | PTQ | shown by |", "|---|---|---|---|"]
        for name in sorted(groups[group], key=str.lower):
            entry = groups[group][name]
            cells = ["; ".join(sorted(entry.get(callback, {"-"}))) for callback in ("QAT", "PTQ")]
            label = f"{name} ({'; '.join(sorted(entry['note']))})" if "note" in entry else name
            lines.append(f"| {label} | {' | '.join(cells)} | {', '.join(sorted(entry['tests']))} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
