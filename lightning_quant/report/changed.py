"""Which samples got another prediction, and which operator did it."""

from dataclasses import dataclass

from lightning_quant.measure.changed_predictions import ChangedPredictions
from lightning_quant.report.section import Section
from lightning_quant.terminal.tables import one_line

_NUM_NAMED = 3


@dataclass(frozen=True)
class Changed(Section):
    """Samples whose prediction changed; report.html shows some.

    Attributes:
        changed: None where the model gives no class scores, or nothing was compared.
    """

    changed: ChangedPredictions | None

    def text(self) -> str:
        """Return how many changed, and what brings them back."""
        changed = self.changed
        if changed is None or not changed.num_changed:
            return ""
        line = f"{changed.num_changed:,} of {changed.num_samples:,} predictions changed, on {changed.base}"
        number = len(changed.samples)
        if changed.operators:
            named = [f"{name} {back}" for name, back in list(changed.operators.items())[:_NUM_NAMED]]
            line += f"; of {number} that were looked at, kept float alone brings back: {', '.join(named)}"
        elif changed.num_tried and number:
            line += f"; none of {changed.num_tried} operators, kept float alone, brings one of {number} back"
        return one_line(f"{line}.")

    def scalars(self) -> dict[str, float | None]:
        """Return the share of predictions that changed."""
        return {} if self.changed is None else {"changed_share": self.changed.num_changed / self.changed.num_samples}
