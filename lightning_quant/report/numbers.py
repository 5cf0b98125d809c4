"""What became of each operator's numbers, and how long each takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_quant.measure.operator_numbers import Histogram, OperatorNumbers
from lightning_quant.report.section import Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Operators that are drawn for loggers.
_NUM_DRAWN = 4


@dataclass(frozen=True)
class Numbers(Section):
    """Noise, histograms and time, operator by operator; report.html draws them.

    Attributes:
        numbers: of each operator that runs in integers; empty where nothing was looked at.
        operator_ms: row of the plan to milliseconds of a call at the smallest batch, under the empty name what belongs
            to no row; empty where the runtime does not profile.
    """

    numbers: tuple[OperatorNumbers, ...]
    operator_ms: dict[str, float]

    def figures(self) -> dict[str, "Callable[[], Figure]"]:
        """Return histograms of the operators with the most noise of their own."""
        return {"histograms": self._histograms} if self._worst() else {}

    def _worst(self) -> list[OperatorNumbers]:
        drawn = (one for one in self.numbers if one.weight is not None or one.output is not None)
        return sorted(drawn, key=lambda one: one.own_db)[:_NUM_DRAWN]

    def _histograms(self) -> "Figure":
        from matplotlib.figure import Figure

        worst = self._worst()
        figure = Figure(figsize=(8, 2 * len(worst)), layout="constrained")
        for one, axes in zip(worst, figure.subplots(len(worst), 2, squeeze=False), strict=True):
            _draw(axes[0], f"{one.name}: weight, in steps", one.weight)
            _draw(axes[1], "output", one.output)
        return figure


def _draw(axes: "Axes", title: str, histogram: Histogram | None) -> None:
    # No mathematical text in names that somebody else chose.
    axes.set_title(title.replace("$", r"\$"), fontsize="small")
    if histogram is None:
        axes.axis("off")
        return
    axes.stairs(
        histogram.counts,
        [
            histogram.start + (histogram.stop - histogram.start) * i / len(histogram.counts)
            for i in range(len(histogram.counts) + 1)
        ],
        fill=True,
    )
    axes.set(yscale="symlog", xlabel=f"{histogram.clipped:.2%} clipped")
    for end in (histogram.low, histogram.high):
        axes.axvline(end, color="black", linewidth=1)
