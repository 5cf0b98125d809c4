"""What each part of the validation data adds to a metric, and how sure that makes one of the difference of two models.

Two models see the same batches, so that what is easy or hard for both is left out of the difference. Its spread is
estimated by leaving one block of batches out after the other, which holds for means as well as for metrics that are no
means, F1 or an area under a curve say.

Source: B. Efron and C. Stein, "The jackknife estimate of variance", Annals of Statistics 9 (1981), equation 1.1, on
differences of the same statistic. Where all blocks differ, but a few much more than others, the interval is that of a
gamma distribution with one such block more, exact for a count of equal ones: M. P. Fay and E. J. Feuer, "Confidence
intervals for directly standardized rates", Statistics in Medicine 16 (1997), with a block of the size that the third
moment tells for the largest. Where few samples differ the spread says too little, and the interval is at least as wide
as that of the share of samples that do: C. J. Clopper and E. S. Pearson, "The use of confidence or fiducial limits
illustrated in the case of the binomial", Biometrika 26 (1934). Where none does, that is about 3 by their number.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

CONFIDENCE = 0.95
# Fewer blocks than these say little of their spread; more than the others cost time and add nothing.
MIN_BLOCKS, MAX_BLOCKS = 5, 64
# Degrees of freedom with which Student's distribution is the normal one, and skewness with which a gamma one is.
_MANY, _NO_SKEWNESS = 10**6, 1e-3
# Share of a sample that a value may be off for what floats round.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Contributions:
    """A metric as a function of parts of the data.

    Attributes:
        number: of parts: batches, or samples.
        of: from indices of parts to the metric of these alone.
        sizes: what tells parts of two models apart that are not of the same data; samples of each, where known.
        samples: in all parts; their number where nobody knows.
        source: name of the module's metric that they are of; empty where they are of what was logged itself.
        step: gives by how much the metric changes at most where one sample is answered otherwise; None where that is
            the sample's share, as of a mean.
    """

    number: int
    of: Callable[[Sequence[int]], float]
    sizes: tuple[float, ...] = ()
    samples: int = 0
    source: str = ""
    step: Callable[[], float] | None = None

    def ordered(self, order: Sequence[int]) -> "Contributions":
        """Return these parts, or some of them, in another order."""
        sizes = tuple(self.sizes[i] for i in order) if self.sizes else ()
        samples = round(math.fsum(sizes)) if sizes else self.samples * len(order) // self.number
        of = self.of
        return replace(self, number=len(order), of=lambda at: of([order[i] for i in at]), sizes=sizes, samples=samples)


@dataclass(frozen=True)
class Difference:
    """Quantized minus float.

    Attributes:
        value: the difference on all data.
        margin: half the width of its two-sided interval of 90 %: with `CONFIDENCE`, it is at most `value + margin`, and
            at least `value - margin`. None where the metric has no parts, or too few.
        why: no interval, in words.
        degrees: of freedom that the margin has; 0 where they are not known.
        samples: that were seen; 0 where nobody knows.
        differing: how many of these, at least; all where many do.
        span: by how much one of them may differ.
    """

    value: float
    margin: float | None = None
    why: str = ""
    degrees: int = 0
    samples: int = 0
    differing: int = 0
    span: float = 1.0

    def worst(self, *, higher_is_better: bool, confidence: float = CONFIDENCE) -> float:
        """Return by how much the metric gets worse at most, with confidence where there is an interval."""
        return (-self.value if higher_is_better else self.value) + self._margin(confidence)

    def _margin(self, confidence: float) -> float:
        degrees = self.degrees or _MANY
        wider = student_quantile(confidence, degrees) / student_quantile(CONFIDENCE, degrees)
        return max((self.margin or 0.0) * wider, unseen(self.differing, self.samples, confidence) * self.span)


def unseen(differing: int, samples: int, confidence: float = CONFIDENCE) -> float:
    """Return by how much the share of all data that differs may be above the one of these samples; 0 for none."""
    from scipy.special import betaincinv

    if differing >= samples:
        return 0.0
    return float(betaincinv(differing + 1, samples - differing, confidence)) - differing / samples


class Metrics(dict[str, float]):
    """What a validation loop logged, by name.

    Attributes:
        higher_is_better: of the metrics of torchmetrics that say so.
        draws: whether a validation step drew random numbers.
        contributions: of the metrics that parts of the data make up, where that was asked for.
    """

    def __init__(
        self,
        values: Mapping[str, float] | None = None,
        higher_is_better: dict[str, bool] | None = None,
        *,
        draws: bool = False,
        contributions: dict[str, Contributions] | None = None,
    ) -> None:
        super().__init__(values or {})
        self.higher_is_better, self.draws = higher_is_better or {}, draws
        self.contributions = contributions or {}


def of_samples(values: Sequence[float]) -> Contributions:
    """Return the contributions of samples to their mean."""
    return of_means(list(values), [1.0] * len(values))


def of_means(values: list[float], weights: list[float]) -> Contributions:
    """Return the contributions of batches to a mean: the mean of each, and its number of samples."""

    def of(parts: Sequence[int]) -> float:
        total = math.fsum(weights[i] for i in parts)
        return math.fsum(values[i] * weights[i] for i in parts) / total if total else math.nan

    return Contributions(len(values), of, tuple(weights), round(math.fsum(weights)))


def difference(
    quantized: float, floating: float, parts: Contributions | None, float_parts: Contributions | None
) -> Difference:
    """Return how far two values of a metric are apart, with an interval where both have the same parts."""
    value = quantized - floating
    if parts is None or float_parts is None:
        return Difference(value, why="the metric has no contribution of each batch")
    if parts.number != float_parts.number or parts.sizes != float_parts.sizes:
        return Difference(value, why="the batches were not the same for both models")
    number = min(parts.number, MAX_BLOCKS)
    if number < MIN_BLOCKS:
        return Difference(value, why=f"{parts.number} batches are too few for an interval")
    left_out, blocks = [], list[list[int]]()
    for block in range(number):
        blocks.append([i for i in range(parts.number) if i * number // parts.number == block])
        rest = [i for i in range(parts.number) if i * number // parts.number != block]
        left_out.append(parts.of(rest) - float_parts.of(rest))
    if not all(map(math.isfinite, left_out)):
        return Difference(value, why="the metric is not defined without some of the batches")
    mean = fmean(left_out)
    influences = [(number - 1) / number * (mean - x) for x in left_out]
    variance = number / (number - 1) * math.fsum(x**2 for x in influences)
    margin = student_quantile(CONFIDENCE, number - 1) * math.sqrt(variance)
    pairs = [(parts.of(block), float_parts.of(block)) for block in blocks]
    # Of a block in which it is not defined, one without a positive sample say, nothing is known to differ.
    differing = sum(one != other and not (math.isnan(one) and math.isnan(other)) for one, other in pairs)
    samples = parts.samples or parts.number
    # One sample in a hundred, of a rare class, is much more than a hundredth of an F1 of that class.
    steps = [samples * one.step() for one in (parts, float_parts) if one.step is not None]
    span = max([1.0, abs(quantized), abs(floating), *steps])
    if 2 * differing > number:
        margin = max(margin, skewed_margin(influences)) if variance else margin
        return Difference(value, margin, "", number - 1, samples, samples, span)
    # Several of a block may differ.
    differing = max(differing, math.ceil(abs(value) / span * samples - _TOLERANCE))
    margin = max(margin, unseen(differing, samples) * span)
    return Difference(value, margin, "", number - 1, samples, differing, span)


def skewed_margin(influences: Sequence[float]) -> float:
    """Return how far a statistic may be off by chance, with `CONFIDENCE` to one side, where a few blocks decide.

    Without skewness it is that of Student's distribution.

    Args:
        influences: of each block on it, less their mean, not all zero; three at least.
    """
    number = len(influences)
    variance = number / (number - 1) * math.fsum(x**2 for x in influences)
    third = number**2 / ((number - 1) * (number - 2)) * abs(math.fsum(x**3 for x in influences))
    # Of a count of equal ones, one of them.
    jump = third / variance
    spread = math.sqrt(variance + jump**2)
    of_few = student_quantile(CONFIDENCE, number - 1) / student_quantile(CONFIDENCE, _MANY)
    return jump + of_few * gamma_quantile(CONFIDENCE, 2 * (third + jump**3) / spread**3) * spread


def differences(quantized: Metrics, floating: Metrics) -> dict[str, Difference]:
    """Return how far the metrics of two models are apart that both have, each with an interval where there is one."""
    parts, known = quantized.contributions, floating.contributions
    return {
        name: difference(value, floating[name], parts.get(name), known.get(name))
        for name, value in quantized.items()
        if name in floating
    }


def student_quantile(share: float, degrees: int) -> float:
    """Return the quantile of Student's distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, share))


def gamma_quantile(share: float, skewness: float) -> float:
    """Return the quantile of a gamma distribution of mean 0 and variance 1; with little skewness it is normal's."""
    from scipy.special import gammaincinv, ndtri

    if skewness < _NO_SKEWNESS:
        return float(ndtri(share))
    shape = 4 / skewness**2
    return float(gammaincinv(shape, share) - shape) / math.sqrt(shape)
