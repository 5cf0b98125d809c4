"""Whether the artifact keeps to what the user asked of it."""

from dataclasses import dataclass
from typing import Any

from lightning_quant.report.limits import NO_LIMITS, Limits
from lightning_quant.report.section import Section


@dataclass(frozen=True)
class KeptLimits(Section):
    """What the artifact was to keep to.

    Attributes:
        limits: as the user set them.
        missed: in words, every one that it misses or that nothing was measured for.
    """

    limits: Limits
    missed: tuple[str, ...]

    def failures(self) -> list[str]:
        """Name every limit that was missed."""
        return [f"limits FAILED: {text}" for text in self.missed]

    def scalars(self) -> dict[str, float | None]:
        """Return how many limits were missed, where there are any."""
        return {} if self.limits == NO_LIMITS else {"limits_missed": float(len(self.missed))}

    def to_dict(self) -> dict[str, Any]:
        """Return the limits; what was missed stands among the failures."""
        values = super().to_dict()
        del values["missed"]
        return values
