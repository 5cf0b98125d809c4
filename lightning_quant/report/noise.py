"""How far the artifact's answers are from the float model's, with what helps."""

from dataclasses import dataclass

from lightning_quant.measure.output_noise import FLOOR_DB, Noise
from lightning_quant.report.section import Section


@dataclass(frozen=True)
class NoiseSection(Section):
    """Float against artifact.

    Attributes:
        noise: for every output; None when it was not measured.
        way_out: what helps against it, in words.
        usual_db: decibels that outputs usually reach, where nothing else judges them.
    """

    noise: Noise | None
    way_out: str
    usual_db: float = FLOOR_DB

    def text(self) -> str:
        """Return a table of outputs."""
        return "" if self.noise is None else str(self.noise)

    def warnings(self) -> list[str]:
        """Name every output that is mostly noise, or has more than is usual, with what helps."""
        texts = [] if self.noise is None else self.noise.warnings(self.usual_db)
        return [f"{text}. {self.way_out}" for text in texts]

    def scalars(self) -> dict[str, float | None]:
        """Return the decibels of the worst output, and of each."""
        return {} if self.noise is None else {**self.noise.scalars()}
