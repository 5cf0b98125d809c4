"""The user's validation metrics of the float, the simulated and the exported model, and whether the last two agree."""

import math
from dataclasses import dataclass

from lightning_quant.report.section import Section
from lightning_quant.terminal.figures import fixed
from lightning_quant.terminal.tables import text_table

# Share of a metric by which the file may be off where quantization costs nothing, and validation samples whose
# predictions may tip.
_TOLERANCE = 0.01
_NUM_TIPPED = 2
# What "±" means.
MARGIN = "± is half of the interval of 90 % for the delta, paired over batches: other validation data of this kind."


@dataclass(frozen=True)
class MetricRow:
    """One validation metric of the float, the simulated and the exported model; None where it was not measured.

    Attributes:
        name: as the user logs it.
        float_value: of the weights that were exported, without rounding.
        simulated: of the fake-quantized model.
        artifact: of the file.
        before: of the last validation before training began to round, where it did.
        num_samples: that the file was measured on.
        higher_is_better: None where neither the metric nor a callback that watches it says so.
        margin: half the width of the interval of `delta`, two-sided, 90 %, paired, see `measure.contributions`; None
            where the metric has no parts, or too few.
    """

    name: str
    float_value: float | None
    simulated: float | None
    artifact: float | None
    before: float | None = None
    num_samples: int | None = None
    higher_is_better: bool | None = None
    margin: float | None = None

    @property
    def delta(self) -> float | None:
        """Artifact minus float, in the metric's unit."""
        return None if self.artifact is None or self.float_value is None else self.artifact - self.float_value


@dataclass(frozen=True)
class Metrics(Section):
    """The user's validation metrics.

    Attributes:
        metrics: one for each name.
        trained: whether the weights were trained through rounding, so that without it they are no float model's.
    """

    metrics: tuple[MetricRow, ...]
    trained: bool

    def text(self) -> str:
        """Return a table of metrics, after training with what "float" means there."""
        if not self.metrics:
            return ""
        begun = self.trained and any(row.before is not None for row in self.metrics)
        header = ("validation", *["float, before rounding began"] * begun)
        header += ("trained weights without rounding" if self.trained else "float", "simulated", "artifact", "delta")
        rows = []
        for r in self.metrics:
            values = [*[r.before] * begun, r.float_value, r.simulated, r.artifact]
            cells = [fixed(value, r.float_value) for value in values]
            margin = "" if r.delta is None or r.margin is None else f" ±{fixed(r.margin, r.float_value)}"
            rows.append((r.name, *cells, fixed(r.delta, r.float_value, sign=True) + margin))
        return text_table(header, rows) + self._about_margins() + self._about_trained(begun)

    def _about_margins(self) -> str:
        known = any(row.delta is not None and row.margin is not None for row in self.metrics)
        return f"\n\n{MARGIN}" if known else ""

    def _about_trained(self, begun: bool) -> str:
        if not self.trained:
            return ""
        told = "" if begun else " What a float model reaches is not known: no validation ran before rounding began."
        return f"\n\nDelta is that to the trained weights without rounding, which are no float model's weights.{told}"

    def failures(self) -> list[str]:
        """Say of which metrics the file's value is farther from the simulated one than that of a right file can be.

        A right file differs by what tipped rounding ties do: less than quantization itself, unless that moved nothing.
        """
        return [
            f"parity FAILED: {row.name} is {row.artifact:.4g} of the artifact and {row.simulated:.4g} simulated, "
            "farther apart than equal computations are: validation ran something else on one of them"
            for row in self.metrics
            if _is_off(row, trained=self.trained)
        ]

    def scalars(self) -> dict[str, float | None]:
        """Return every metric of float, simulated and exported model, and what it changed by."""
        values: dict[str, float | None] = {}
        for row in self.metrics:
            name = row.name.replace(" ", "_")
            values |= {f"float/{name}": row.float_value, f"simulated/{name}": row.simulated}
            values |= {f"artifact/{name}": row.artifact, f"delta/{name}": row.delta}
            values[f"float_before/{name}"] = row.before
        return values


def _is_off(row: MetricRow, *, trained: bool) -> bool:
    if row.artifact is None or row.simulated is None or math.isnan(row.simulated):
        return False
    if row.artifact == row.simulated:  # Infinities, too.
        return False
    floating = row.simulated if trained or row.float_value is None else row.float_value
    size = max(abs(row.simulated), abs(floating))
    # A share, such as accuracy, moves by one part in the number of samples whatever its own size.
    whole = 1.0 if min(row.simulated, row.artifact) >= 0 and max(row.simulated, row.artifact) <= 1 else size
    tipped = whole * _NUM_TIPPED / row.num_samples if row.num_samples else 0.0
    allowed = max(2 * abs(row.simulated - floating), _TOLERANCE * size, tipped)
    return not abs(row.artifact - row.simulated) <= allowed
