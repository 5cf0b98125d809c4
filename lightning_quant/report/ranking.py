"""Which operator costs what, where that was asked for."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_quant.measure.sensitivity import Sensitivity
from lightning_quant.report.section import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Operators that are printed and drawn.
_NUM_WORST = 10


@dataclass(frozen=True)
class Ranking(Section):
    """Operators by what they cost.

    Attributes:
        sensitivity: the most harmful first; None where it was not asked for.
    """

    sensitivity: Sensitivity | None

    def text(self) -> str:
        """Return where the loss comes from, and a table of the worst operators."""
        if self.sensitivity is None:
            return ""
        worst = dataclasses.replace(self.sensitivity, layers=self.sensitivity.layers[:_NUM_WORST])
        left = len(self.sensitivity.layers) - len(worst.layers)
        return f"{worst}\n\nThe other {left} operators are in report.json." if left else str(worst)

    def figures(self) -> "dict[str, Callable[[], Figure]]":
        """Return bars of how much of the error the worst operators account for."""
        return {"sensitivity": self._bars} if self.sensitivity is not None and self.sensitivity.error else {}

    def _bars(self) -> "Figure":
        from matplotlib.figure import Figure

        assert self.sensitivity is not None
        worst = self.sensitivity.layers[:_NUM_WORST][::-1]
        shares = [100 * (1 - layer.without_error / self.sensitivity.error) for layer in worst]
        figure = Figure(figsize=(6, 1 + 0.3 * len(worst)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(worst)), shares)
        # No mathematical text in names that somebody else chose.
        axes.set_yticks(range(len(worst)), [layer.name.replace("$", r"\$") for layer in worst])
        axes.set(xlabel="error falls by, % with the operator in float")
        return figure
