"""The plan in a report: what runs in integers in one line, and every operator that stays float with its reason."""

import collections
from dataclasses import dataclass
from typing import Any

from lightning_quant import runtimes
from lightning_quant.graph.plan import LOST
from lightning_quant.report.section import Section
from lightning_quant.terminal.tables import one_line, text_table

# Shares of the multiply-adds and of the weights' bytes below which little is gained.
_LOW = 0.5


@dataclass(frozen=True)
class Coverage(Section):
    """What runs in integers, what is stored with fewer bits, and why the rest is not.

    Attributes:
        plan: as nested dicts.
        operators: operator type to number in the optimized session.
        still_float: kind to number of planned integer operators that the runtime runs in float.
        step_share: share of the multiply-adds of the LightningModule's step that the module makes, in [0, 1].
        min_stored_share: share of the weights' values that a recipe of layers must store with fewer bits; None for
            others.
    """

    plan: dict[str, Any]
    operators: dict[str, int]
    still_float: dict[str, int]
    step_share: float
    min_stored_share: float | None

    def text(self) -> str:
        """Return the plan in words, and a table of what stays float."""
        return summarize(self.plan, self.operators, self.step_share)

    def failures(self) -> list[str]:
        """Say so where a recipe of layers stored less than it must."""
        if self.min_stored_share is None or self.plan["stored_share"] >= self.min_stored_share:
            return []
        stored = f"only {self.plan['stored_share']:.1%} of the weights' values are stored with fewer bits"
        return [f"{self.plan['recipe']} FAILED: {stored}, less than {self.min_stored_share:.0%}"]

    def warnings(self) -> list[str]:
        """Say where little is gained, and what the runtime did not run in integers."""
        low = [] if self.failures() else low_coverage(self.plan)
        low += [f"{count} planned int8 {kind} still run in float" for kind, count in self.still_float.items()]
        lost = [row["name"] for row in self.plan["rows"] if row["reason"] == LOST]
        some = f"{', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}"
        return low + [f"{len(lost)} rows of the plan ({some}): {LOST}"] * bool(lost)

    def scalars(self) -> dict[str, float | None]:
        """Return shares of multiply-adds and of the weights' bytes."""
        return {
            "coverage": self.plan["coverage"],
            "step_coverage": self.plan["coverage"] * self.step_share,
            "weight_coverage": self.plan["weight_coverage"],
        }


def summarize(plan: dict[str, Any], operators: dict[str, int], step_share: float = 1.0) -> str:
    """Return the text for a plan.

    Args:
        plan: as nested dicts.
        operators: counts of the runtime's session.
        step_share: share of the multiply-adds of the LightningModule's step that the module makes.
    """
    rows = plan["rows"]
    fused = sum(row["action"] == "fused" for row in rows)
    counts = collections.Counter(row["action"] for row in rows if row["action"] not in ("float", "fused"))
    if plan["graphs"]:
        stored = ", ".join(f"{count} {action}" for action, count in counts.most_common() if action != "int8")
        first = f"{counts['int8']} operators run in int8 with {fused} more fused into them"
        first += f", layers are stored as {stored}" if stored else ""
        first += f"; {plan['weight_coverage']:.1%} of the weights' bytes are stored with fewer bits"
    else:
        first = f"Layers: {', '.join(f'{count} {action}' for action, count in counts.most_common())}"
        of_what = "values that are not excluded" if any(row["excluded"] for row in rows) else "values"
        first += f"; {plan['stored_share']:.1%} of the weights' {of_what} are stored with fewer bits"
    parts = [f"{first}: {plan['coverage']:.1%} of the multiply-adds."]
    if step_share < 1:
        of_step = f"{plan['coverage'] * step_share:.1%} of the multiply-adds of the whole step"
        parts.append(f"The module makes {step_share:.1%} of the LightningModule's step: that is {of_step}.")
    if operators:
        by_number = sorted(operators.items(), key=lambda item: (-item[1], item[0]))
        counted = ", ".join(f"{count} {name}" for name, count in by_number)
        parts.append(one_line(f"The runtime's optimized session: {counted}."))
    total = sum(row["macs"] for row in rows)
    left = [
        (row["name"], row["kind"], f"{row['macs'] / total:.1%}" if row["macs"] else "", row["reason"])
        for row in rows
        if row["action"] == "float"
    ]
    if left:
        parts.append(text_table(("stays float", "kind", "multiply-adds", "because"), left))
    other = [
        (row["name"], row["action"], row["reason"])
        for row in rows
        if row["action"] not in ("float", "fused", "int8") and row["reason"]
    ]
    if other:
        parts.append(text_table(("layer", "is", "because"), other))
    return "\n\n".join(parts)


def low_coverage(plan: dict[str, Any]) -> list[str]:
    """Return what is too little in a plan, with what would help."""
    helps = "the plan has all reasons"
    if plan["graphs"]:
        where = runtimes.that(lambda runtime: runtime.runs_layers(("weight_only", "dynamic")))
        helps = f"recipe 'int8_weight_only' or 'int8_dynamic' on runtime {where} takes more layers"
    asked = [row for row in plan["rows"] if not row["excluded"]]
    left = [row for row in asked if row["action"] == "float"]
    # Of a static recipe, layers that are stored compute in float.
    as_asked = ("int8", "fused") if plan["graphs"] else {row["action"] for row in asked} - {"float"}
    most = max((row for row in asked if row["action"] not in as_asked), key=lambda row: row["macs"], default=None)
    lines = []
    total, weights = (sum(row[what] for row in asked) for what in ("macs", "weights"))
    if most is not None and plan["coverage"] * sum(row["macs"] for row in plan["rows"]) < _LOW * total:
        lines.append(
            f"only {plan['coverage']:.1%} of the multiply-adds run as {plan['recipe']!r} asks, most of the rest is in "
            f"{most['name']} ({most['kind']}: {most['reason'] or most['action']}); {helps}"
        )
    if plan["graphs"] and sum(row["weights"] for row in left) > (1 - _LOW) * weights:
        lines.append(
            f"only {plan['weight_coverage']:.1%} of the weights' bytes are stored with fewer bits, so that the file is "
            f"not much smaller; {helps}"
        )
    return lines
