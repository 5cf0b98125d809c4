"""What a process of its own takes of memory for an artifact, where a limit asks for it."""

from dataclasses import dataclass

from lightning_quant.report.section import Section


@dataclass(frozen=True)
class Memory(Section):
    """Memory of a process that loads an artifact and calls it once.

    Attributes:
        peak_memory_mb: at its peak, on top of what it had before, in units of 2**20 bytes.
        float_peak_memory_mb: the same for the float model in the runtime's own format; None where nothing asked for it,
            or it was not measured.
    """

    peak_memory_mb: float
    float_peak_memory_mb: float | None = None

    def text(self) -> str:
        """Return the peak in a sentence."""
        text = f"A process that loads and calls the artifact takes {self.peak_memory_mb:.1f} MiB for it at its peak"
        if self.float_peak_memory_mb is not None:
            ratio = self.peak_memory_mb / self.float_peak_memory_mb
            text += f", {ratio:.3f} of the {self.float_peak_memory_mb:.1f} MiB for float in the same format"
        return f"{text}."

    def scalars(self) -> dict[str, float | None]:
        """Return the peak, and its ratio to float's where that was measured."""
        floating = self.float_peak_memory_mb
        ratio = {} if floating is None else {"peak_memory_ratio": self.peak_memory_mb / floating}
        return {"peak_memory_mb": self.peak_memory_mb, **ratio}
