"""Whether the artifact computes what was simulated."""

from dataclasses import dataclass

from lightning_quant.planned.planned_model import Compared
from lightning_quant.report.section import Section
from lightning_quant.terminal.tables import one_line


@dataclass(frozen=True)
class Agreement(Section):
    """Artifact against simulation.

    Attributes:
        parity: None when it was not checked.
        remark: what explains that it failed; empty for nothing.
    """

    parity: Compared | None
    remark: str = ""

    def text(self) -> str:
        """Return parity in one line."""
        return "" if self.parity is None else one_line(str(self.parity))

    def failures(self) -> list[str]:
        """Say where the artifact is not what was simulated."""
        failures = [] if self.parity is None else self.parity.failures
        return [f"parity FAILED: {failure}{self.remark and f'. {self.remark}'}" for failure in failures]

    def scalars(self) -> dict[str, float | None]:
        """Return whether it failed, and the worst operator's share of values within one step."""
        if self.parity is None:
            return {}
        return {"parity_worst_share": self.parity.worst_share, "parity_failed": float(bool(self.failures()))}
