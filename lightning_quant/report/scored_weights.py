"""Weights of one training whose files were scored: those that are the artifact, and the others."""

from dataclasses import dataclass
from typing import Any

from lightning_quant.report.section import Section
from lightning_quant.terminal.figures import fixed
from lightning_quant.terminal.tables import text_table


@dataclass(frozen=True)
class ScoredWeights:
    """Some weights as an exported file.

    Attributes:
        weights: which they are, in words.
        is_artifact: whether the artifact is of these.
        metrics: of the file, by validation.
        limits: in words, of each limit what is reached and allowed.
        keeps_limits: whether all are kept.
        size_bytes: of the model files.
    """

    weights: str
    is_artifact: bool
    metrics: dict[str, float]
    limits: str
    keeps_limits: bool
    size_bytes: int


@dataclass(frozen=True)
class WeightsSection(Section):
    """All weights that were scored.

    Attributes:
        weights: those of the artifact first.
    """

    weights: tuple[ScoredWeights, ...]

    def text(self) -> str:
        """Return a table with a row for each."""
        names = list(dict.fromkeys(name for one in self.weights for name in one.metrics))
        rows = [
            (
                *(f"{one.weights}{' (the artifact)' if one.is_artifact else ''}", "yes" if one.keeps_limits else "no"),
                *(fixed(one.metrics[name]) if name in one.metrics else "-" for name in names),
                *(one.limits, f"{one.size_bytes:,}"),
            )
            for one in self.weights
        ]
        return text_table(("scored on its file", "keeps limits", *names, "limits", "bytes"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the rows by their own name."""
        return {"scored_weights": super().to_dict()["weights"]}
