"""What a search makes best, and what it may spend."""

from typing import Any

from lightning_quant.arguments.arguments import check_positive
from lightning_quant.arguments.choice import closest
from lightning_quant.errors import QuantizationError

SIZE, LATENCY = "size", "latency"
COSTS = (SIZE, LATENCY)
"""Objectives that are no metrics: what float costs."""


def check_search(objective: Any, max_validations: Any, time_budget_s: Any) -> None:
    """Refuse what no search can do.

    Raises:
        QuantizationError: the objective is no name, or there is nothing to spend.
    """
    if objective is not None and (not isinstance(objective, str) or not objective):
        raise QuantizationError(
            f"Expected `objective` to be {SIZE!r}, {LATENCY!r} or the name of a metric, but got {objective!r:.60}."
        )
    if objective not in (None, *COSTS) and (close := closest(objective, COSTS, cutoff=0.7)):
        raise QuantizationError(
            f"Expected `objective` to be {SIZE!r}, {LATENCY!r} or the name of a metric, but got {objective!r}: "
            f"{close[0]!r} was probably meant."
        )
    if max_validations is not None:
        check_positive("max_validations", max_validations, " or None")
    is_number = isinstance(time_budget_s, int | float) and not isinstance(time_budget_s, bool)
    if time_budget_s is not None and not (is_number and time_budget_s > 0):
        raise QuantizationError(
            f"Expected `time_budget_s` to be a number of seconds above zero, or None, but got {time_budget_s!r:.60}."
        )
