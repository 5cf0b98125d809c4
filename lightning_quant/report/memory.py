"""What a process of its own takes of memory for an artifact, where a limit asks for it."""

from dataclasses import dataclass

from lightning_quant.report.section import Section


@dataclass(frozen=True)
class Memory(Section):
    """Memory of a process that loads an artifact and calls it once.

    Attributes:
        peak_memory_mb: at its peak, on top of what it had before, in units of 2**20 bytes.
    """

    peak_memory_mb: float

    def text(self) -> str:
        """Return the peak in a sentence."""
        return f"A process that loads and calls the artifact takes {self.peak_memory_mb:.1f} MiB for it at its peak."

    def scalars(self) -> dict[str, float | None]:
        """Return the peak."""
        return {"peak_memory_mb": self.peak_memory_mb}
