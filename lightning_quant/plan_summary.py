"""The plan in a report: what runs in integers in one line, and every operator that stays float with its reason."""

import collections
from typing import Any

from lightning_quant.tables import text_table


def summarize(plan: dict[str, Any], operators: dict[str, int]) -> str:
    """Return the text for a plan as nested dicts and the operator counts of the runtime's session."""
    rows = plan["rows"]
    fused = sum(row["action"] == "fused" for row in rows)
    counts = collections.Counter(row["action"] for row in rows if row["action"] not in ("float", "fused"))
    if not any(row.get("weights") for row in rows):
        first = f"{counts['int8']} operators run in int8 with {fused} more fused into them"
    else:
        first = f"Layers: {', '.join(f'{count} {action}' for action, count in counts.most_common())}"
        of_what = "values that are not excluded" if any(map(_is_excluded, rows)) else "values"
        first += f"; {plan['stored_share']:.1%} of the weights' {of_what} are stored with fewer bits"
    parts = [f"{first}: {plan['coverage']:.1%} of the multiply-adds."]
    if operators:
        by_number = sorted(operators.items(), key=lambda item: (-item[1], item[0]))
        counted = ", ".join(f"{count} {name}" for name, count in by_number)
        parts.append(f"The runtime's optimized session: {counted}.")
    left = [(row["name"], row["kind"], row["reason"]) for row in rows if row["action"] == "float"]
    if left:
        parts.append(text_table(("stays float", "kind", "because"), left))
    other = [
        (row["name"], row["action"], row["reason"])
        for row in rows
        if row["action"] not in ("float", "fused", "int8") and row["reason"]
    ]
    if other:
        parts.append(text_table(("layer", "is", "because"), other))
    return "\n\n".join(parts)


def _is_excluded(row: dict[str, Any]) -> bool:
    return row["reason"].startswith(("excluded by", "not in `include`"))
