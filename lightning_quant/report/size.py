"""Bytes of float model, checkpoint and artifact on disk."""

from dataclasses import dataclass
from typing import Any

from lightning_quant.report.section import Section
from lightning_quant.terminal.tables import text_table


@dataclass(frozen=True)
class Size(Section):
    """Bytes on disk.

    Attributes:
        float_bytes: of the float parameters and buffers of the module.
        checkpoint_bytes: of the training checkpoint; None when there is none.
        artifact_bytes: of the exported model.
    """

    float_bytes: int
    checkpoint_bytes: int | None
    artifact_bytes: int

    @property
    def size_ratio(self) -> float:
        """Artifact divided by float parameters and buffers."""
        return self.artifact_bytes / self.float_bytes

    def text(self) -> str:
        """Return a table of bytes and ratios."""
        sizes = {
            "float weights": self.float_bytes,
            "training checkpoint": self.checkpoint_bytes,
            "artifact": self.artifact_bytes,
        }
        rows = [(name, f"{size:,}", f"{size / self.float_bytes:.2f}") for name, size in sizes.items() if size]
        return text_table(("size on disk", "bytes", "ratio"), rows)

    def warnings(self) -> list[str]:
        """Say so where the artifact is larger than float."""
        if self.size_ratio <= 1:
            return []
        return [f"the artifact is larger than the float model: {self.size_ratio:.2f} times its bytes"]

    def scalars(self) -> dict[str, float | None]:
        """Return the bytes and their ratio."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return the bytes and their ratio."""
        return {**super().to_dict(), "size_ratio": self.size_ratio}
