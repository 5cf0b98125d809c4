"""The plan in a report: what runs in integers in one line, and every operator that stays float with its reason."""

from typing import Any

from lightning_quant.tables import text_table


def summarize(plan: dict[str, Any], operators: dict[str, int]) -> str:
    """Return the text for a plan as nested dicts and the operator counts of the runtime's session."""
    rows = plan["rows"]
    integer = [row for row in rows if row["action"] == "int8"]
    fused = sum(row["action"] == "fused" for row in rows)
    parts = [
        f"{len(integer)} operators run in int8 with {fused} more fused into them: {plan['coverage']:.1%} of the "
        "multiply-adds."
    ]
    if operators:
        by_number = sorted(operators.items(), key=lambda item: (-item[1], item[0]))
        counted = ", ".join(f"{count} {name}" for name, count in by_number)
        parts.append(f"The runtime's optimized session: {counted}.")
    left = [(row["name"], row["kind"], row["reason"]) for row in rows if row["action"] == "float"]
    if left:
        parts.append(text_table(("stays float", "kind", "because"), left))
    return "\n\n".join(parts)
