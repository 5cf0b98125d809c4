"""What one trial keeps out of the integer recipe, and what was measured of it."""

from dataclasses import dataclass, field
from typing import Any

from lightning_quant.measure.contributions import Difference

FLOAT, HALF, STORED, WIDE = "float", "float16", "int8_weight_only", "int8_weights"
OUT = (STORED, FLOAT)
"""Schemes of operators that leave the integers, and the tensors around them with them: WIDE is of a weight alone."""


@dataclass(frozen=True)
class Choice:
    """What differs from the whole recipe.

    Attributes:
        kept: operator and its safer scheme, as `overrides` of the recipe have them, in the order of the ranking.
        accurate: whether calibration also takes the steps of `int8_accurate`.
    """

    kept: tuple[tuple[str, str], ...] = ()
    accurate: bool = False

    def __str__(self) -> str:
        if self.accurate:
            return "the whole recipe, with the steps of int8_accurate"
        if not self.kept:
            return "the whole recipe"
        in_float = all(scheme == FLOAT for _, scheme in self.kept)
        names = [name if in_float else f"{name} ({scheme})" for name, scheme in self.kept]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{', '.join(names[:3])}{more} kept {'float' if in_float else 'safer'}"

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {"kept": dict(self.kept), **({"accurate": True} if self.accurate else {})}


@dataclass(frozen=True)
class Measured:
    """What was measured of one exported file.

    Attributes:
        metrics: of the user's validation.
        differences: the same minus float, with intervals where there are any.
        size_bytes: of the model files.
        size_ratio: the same by float's bytes.
        latency_ms: by batch size; empty where nothing asked for it.
        speedup: against the faster float peer, by batch size.
        transitions: tensors that are quantized for integers, or dequantized for float.
        share: of the validation data that metrics and differences are of.
        peak_memory_mb: of a process that loads the file and calls it; None where nothing asked for it, or it failed.
        peak_memory_ratio: the same by that of float.
        no_peak: why there is none though a limit asked for it.
    """

    metrics: dict[str, float]
    differences: dict[str, Difference]
    size_bytes: int
    size_ratio: float
    latency_ms: dict[str, float] = field(default_factory=dict)
    speedup: dict[str, float] = field(default_factory=dict)
    transitions: int = 0
    share: float = 1.0
    peak_memory_mb: float | None = None
    peak_memory_ratio: float | None = None
    no_peak: str = ""

    @property
    def relative_time(self) -> float:
        """Time by that of the faster float peer, both timed in turn, at the slowest batch; infinite where untimed."""
        slowest = max(self.latency_ms, key=lambda batch: self.latency_ms[batch], default="")
        return 1 / self.speedup[slowest] if self.speedup.get(slowest) else float("inf")


@dataclass(frozen=True)
class Verdict:
    """Whether one limit is kept.

    Attributes:
        limit: name of what it is on.
        allowed: the bound; of a metric the change in its worse direction, positive.
        reached: the same of the file, at worst with confidence where there is an interval.
        estimate: the same without the interval.
        kept: whether the limit is.
        basis: what that was decided on, in words.
        on_metric: whether it is on a metric, and not on size or speed.
    """

    limit: str
    allowed: float
    reached: float | None
    estimate: float | None
    kept: bool
    basis: str = ""
    on_metric: bool = False

    @property
    def miss(self) -> float:
        """By how much the limit is missed, as a share of it; zero where it is kept."""
        if self.kept:
            return 0.0
        if self.reached is None:
            return float("inf")
        return abs(self.reached - self.allowed) / max(abs(self.allowed), 1e-6)


@dataclass(frozen=True)
class Trial:
    """One file that was exported and validated.

    Attributes:
        choice: what it keeps out of the recipe.
        measured: None where it could not be made.
        verdicts: one for each limit.
        seconds: how long all of it took.
        error: why it could not be made.
        validations: how often the validation data were read: less than once where a part decided, and a whole time on
            top of that where it then was to be the artifact.
    """

    choice: Choice
    measured: Measured | None
    verdicts: tuple[Verdict, ...]
    seconds: float
    error: str = ""
    validations: float = 1.0

    @property
    def is_whole(self) -> bool:
        """Whether it was validated on all data, or could not be made."""
        return self.measured is None or self.measured.share == 1

    @property
    def keeps_all(self) -> bool:
        """Whether it keeps every limit."""
        return self.measured is not None and all(verdict.kept for verdict in self.verdicts)

    def keeps(self, *, on_metrics: bool) -> bool:
        """Tell whether it keeps every limit on metrics, or every other one."""
        return self.measured is not None and all(v.kept for v in self.verdicts if v.on_metric == on_metrics)

    @property
    def misses(self) -> tuple[float, ...]:
        """How many limits it misses, and by how much in all: less is better."""
        missed = [verdict.miss for verdict in self.verdicts if not verdict.kept]
        return (float("inf"), 0.0) if self.measured is None else (len(missed), sum(missed))
