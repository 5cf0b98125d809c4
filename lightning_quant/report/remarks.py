"""What else a reader should know, and how long each stage took."""

from dataclasses import dataclass

from lightning_quant.report.section import Section
from lightning_quant.terminal.tables import one_line


@dataclass(frozen=True)
class Notes(Section):
    """What else a reader should know.

    Attributes:
        notes: sentences without a full stop.
        missing: what could not be measured, and why, likewise.
    """

    notes: tuple[str, ...]
    missing: tuple[str, ...] = ()

    def failures(self) -> list[str]:
        """Say what of that FAILED."""
        return [text for text in self.missing if " FAILED" in text]

    def warnings(self) -> list[str]:
        """Say what else could not be measured."""
        return [text for text in self.missing if " FAILED" not in text]

    def text(self) -> str:
        """Return a paragraph for each note."""
        return "\n\n".join(f"Note: {one_line(note)}." for note in self.notes)


@dataclass(frozen=True)
class Seconds(Section):
    """How long it took.

    Attributes:
        seconds: stage to time.
    """

    seconds: dict[str, float]

    def text(self) -> str:
        """Return all stages in one line."""
        return "Seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in self.seconds.items()) + "."

    def scalars(self) -> dict[str, float | None]:
        """Return the seconds of each stage."""
        return {f"seconds/{stage}": value for stage, value in self.seconds.items()}
