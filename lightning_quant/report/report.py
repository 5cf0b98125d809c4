"""What quantization cost and gained: numbers with their origin, for terminals, files and loggers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_quant.report.section import Section
from lightning_quant.terminal.tables import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Report:
    """All that was measured of one artifact: a head, and sections that each know their subject.

    Attributes:
        recipe: its recipe.
        runtime: its runtime.
        versions: of the libraries that took part.
        sections: in the order in which they are told.
    """

    recipe: str
    runtime: str
    versions: dict[str, str | None]
    sections: tuple[Section, ...]

    @property
    def failures(self) -> list[str]:
        """Why the artifact is not what was asked for or simulated, in plain words; empty when it is."""
        return [text for section in self.sections for text in section.failures()]

    @property
    def warnings(self) -> list[str]:
        """What went wrong, in plain words, failures first."""
        return self.failures + [text for section in self.sections for text in section.warnings()]

    def scalars(self, prefix: str = "quant") -> dict[str, float]:
        """Return the numbers for a logger: `<prefix>/<quantity>`."""
        values = {name: value for section in self.sections for name, value in section.scalars().items()}
        if "parity_failed" in values:
            # Metrics that are apart are a failed parity, too.
            values["parity_failed"] = float(any(text.startswith("parity ") for text in self.failures))
        return {f"{prefix}/{name}": float(value) for name, value in values.items() if value is not None}

    def figures(self) -> dict[str, "Callable[[], Figure]"]:
        """Return name to what draws a picture with matplotlib."""
        return {name: draw for section in self.sections for name, draw in section.figures().items()}

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts and lists that JSON can hold."""
        head = {"recipe": self.recipe, "runtime": self.runtime, "versions": self.versions}
        told = {name: value for section in self.sections for name, value in section.to_dict().items()}
        derived = {"warnings": self.warnings, "failures": self.failures, "scalars": self.scalars()}
        return _finite({**head, **told, **derived})

    def to_markdown(self) -> str:
        """Return the report as it stands in report.md and in the terminal."""
        parts = [f"# {one_line(self.recipe)} on {self.runtime}"]
        parts += [f"**Warning:** {one_line(warning)}." for warning in self.warnings]
        parts += [section.text() for section in self.sections]
        return "\n\n".join(part for part in parts if part) + "\n"

    def __str__(self) -> str:
        return self.to_markdown()


def _finite(value: Any) -> Any:
    """Write infinities and NaN as text, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value
