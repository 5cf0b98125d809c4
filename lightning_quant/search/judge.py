"""Whether what was measured keeps the limits: with a one-sided interval where the metric has parts."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from lightning_quant.measure.contributions import CONFIDENCE, Difference, unseen
from lightning_quant.measure.interim import SHARES
from lightning_quant.report.limits import Limits
from lightning_quant.search.choice import Measured, Verdict


@dataclass(frozen=True)
class Judge:
    """Limits, and in which direction metrics get worse.

    Attributes:
        limits: what is to be kept.
        higher_is_better: of metrics of which that is known.
    """

    limits: Limits
    higher_is_better: Mapping[str, bool | None]

    def __call__(self, measured: Measured, look: int = 1) -> tuple[Verdict, ...]:
        """Return a verdict for each limit.

        Args:
            measured: of a file.
            look: number of the file among those of one search that are judged on the same data, from 1.
        """
        confidence = confidence_of(look) if measured.share == 1 else interim_confidence_of(look)
        verdicts = self._on_metrics(measured.differences, confidence)
        if measured.share < 1:
            part = f"{100 * measured.share:.3g}% of the validation data that decided"
            verdicts = (replace(verdict, basis=f"{verdict.basis}, on the {part}") for verdict in verdicts)
        return (*verdicts, *self._on_costs(measured))

    def decides(self, differences: Mapping[str, Difference], look: int) -> bool | None:
        """Return whether limits on metrics are kept, where an interim look says so already; None where it does not.

        Args:
            differences: of a file from float, on what was seen by now.
            look: number of the file.
        """
        verdicts = list(self._on_metrics(differences, interim_confidence_of(look)))
        if not verdicts or any(v.reached is None or differences[v.limit].margin is None for v in verdicts):
            return None
        # As far as the worst is from the estimate, the best is on its other side.
        if any(2 * v.estimate - v.reached > v.allowed for v in verdicts):  # type: ignore[operator]
            return False
        return True if all(verdict.kept for verdict in verdicts) else None

    def drops(self, names: Iterable[str]) -> dict[str, float]:
        """Return metric to by how much it may get worse.

        Args:
            names: of metrics that there are, of which those with "acc" in their name may have a limit together.
        """
        together = self.limits.max_accuracy_drop
        drops = dict(self.limits.max_drop)
        if together is not None:
            drops |= {name: together for name in names if "acc" in name.lower() and name not in drops}
        return drops

    def direction(self, name: str) -> bool | None:
        """Return whether a metric is better when it is higher; None where nobody says so."""
        if name in self.limits.higher_is_better or name in self.limits.lower_is_better:
            return name in self.limits.higher_is_better
        return self.higher_is_better.get(name)

    @property
    def on_speed(self) -> bool:
        """Whether a limit is on speed."""
        return self.limits.min_speedup is not None or self.limits.max_latency_ms is not None

    @property
    def on_memory(self) -> bool:
        """Whether a limit is on memory."""
        return self.limits.on_memory

    def _on_metrics(self, differences: Mapping[str, Difference], confidence: float) -> Iterator[Verdict]:
        together = self.limits.max_accuracy_drop
        if together is not None and not any("acc" in name.lower() for name in differences):
            yield _unknown("max_accuracy_drop", together, "no metric has `acc` in its name")
        for name, allowed in self.drops(differences).items():
            higher = True if name not in self.limits.max_drop else self.direction(name)
            difference = differences.get(name)
            if difference is None:
                yield _unknown(name, allowed, "it was not measured of float and file")
            elif higher is None:
                yield _unknown(name, allowed, "nobody says whether it is better when higher")
            else:
                yield _of_metric(name, allowed, difference, confidence, higher_is_better=higher)

    def _on_costs(self, measured: Measured) -> Iterator[Verdict]:
        limits = self.limits
        if limits.max_size_ratio is not None:
            yield _at_most("size_ratio", limits.max_size_ratio, measured.size_ratio)
        if limits.max_size_bytes is not None:
            yield _at_most("size_bytes", limits.max_size_bytes, measured.size_bytes)
        if limits.max_latency_ms is not None:
            yield _at_most("latency_ms", limits.max_latency_ms, max(measured.latency_ms.values(), default=None))
        if limits.max_peak_memory_mb is not None:
            peak, why_not = measured.peak_memory_mb, measured.no_peak
            yield _at_most("peak_memory_mb", limits.max_peak_memory_mb, peak, why_not)
        if limits.max_peak_memory_ratio is not None:
            ratio, why_not = measured.peak_memory_ratio, measured.no_peak
            yield _at_most("peak_memory_ratio", limits.max_peak_memory_ratio, ratio, why_not)
        if limits.min_speedup is not None:
            least = min(measured.speedup.values(), default=None)
            kept = least is not None and least >= limits.min_speedup
            yield Verdict("speedup", limits.min_speedup, least, least, kept, "the slowest of the measured batch sizes")


def confidence_of(look: int) -> float:
    """Return the confidence of one look among several at the same data, so that all of them together are wrong in 5 %.

    The k-th look spends 1 / (k (k + 1)) of that, half of it the first one, and any number of looks no more than all.

    Source: K. K. G. Lan and D. L. DeMets, "Discrete sequential boundaries for clinical trials", Biometrika 70 (1983):
    error is spent look by look; that the sum bounds the whole is Bonferroni's inequality.
    """
    return 1 - (1 - CONFIDENCE) / (look * (look + 1))


def interim_confidence_of(look: int) -> float:
    """Return the confidence of each interim look at a file, so that all of one search together are wrong in 5 %.

    That is beside the 5 % of looks at all data, since no interim look accepts a file: it ends the validation of one
    that misses the limits, or of one that keeps them where a cheaper one is to come. What becomes the artifact was
    validated whole and kept the limits there, with the confidence of `confidence_of`.
    """
    return 1 - (1 - confidence_of(look)) / len(SHARES)


def _of_metric(
    name: str, allowed: float, difference: Difference, confidence: float, *, higher_is_better: bool
) -> Verdict:
    estimate = -difference.value if higher_is_better else difference.value
    reached = difference.worst(higher_is_better=higher_is_better, confidence=confidence)
    interval = f"one-sided {100 * confidence:.4g}% interval, paired with float"
    basis = interval if difference.margin is not None else f"point estimate: {difference.why}"
    # What is equal in decimals is allowed: 0.90 - 0.85 is a little more than 0.05.
    kept = reached <= allowed or math.isclose(reached, allowed, rel_tol=1e-6)
    basis += "" if kept else _too_few(allowed, difference, confidence)
    return Verdict(name, allowed, reached, estimate, kept, basis, on_metric=True)


def _too_few(allowed: float, difference: Difference, confidence: float) -> str:
    """Say where samples are too few to show that anything that rounds keeps a limit, though none of them differs."""
    share, samples = allowed / difference.span, difference.samples
    if not samples or not 0 < share < unseen(0, samples, confidence):
        return ""
    needed = math.ceil(math.log(1 - confidence) / math.log1p(-share))
    return f"; so little shows on {needed:,} samples at least, and {samples:,} were read"


def _unknown(name: str, allowed: float, why: str) -> Verdict:
    return Verdict(name, allowed, None, None, kept=False, basis=why, on_metric=True)


def _at_most(name: str, allowed: float, reached: float | None, why_not: str = "") -> Verdict:
    basis = "measured" if reached is not None else f"not measured: {why_not or 'nothing was timed'}"
    return Verdict(name, allowed, reached, reached, reached is not None and reached <= allowed, basis)
