"""Which of several artifacts another one beats, and which one to take: by paired tests where there are."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_quant.artifact.artifact import Artifact
from lightning_quant.measure.contributions import Contributions, Metrics, difference
from lightning_quant.search.objective import LATENCY, SIZE

SNR = "snr_db"
# Noise of a thousandth of the signal's power.
_GOOD_DB = 30.0
"""What stands for metrics where none was measured: the artifact's distance from float."""


@dataclass(frozen=True)
class Point:
    """One recipe on one runtime, and what was measured of its artifact.

    Attributes:
        name: of its folder, and in loggers' keys.
        recipe: its name.
        runtime: likewise.
        artifact: None where none was made.
        reason: why there is none, or why it was not measured.
        metrics: of the artifact, by name; `snr_db` alone where validation gave none.
        changes: the same minus float.
        size_bytes: of the model files.
        size_ratio: the same by float's bytes.
        latency_ms: lower quartile, median and upper quartile by batch size.
        speedup: times as fast as the faster float peer, by batch size.
        failures: what its report says FAILED.
        contributions: what each part of the data adds to a metric, where that is known.
        dominated_by: name of a point that is better, and in nothing worse; empty where there is none.
    """

    name: str
    recipe: str
    runtime: str
    artifact: Artifact | None = None
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    changes: Mapping[str, float] = field(default_factory=dict)
    size_bytes: int = 0
    size_ratio: float = math.nan
    latency_ms: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    speedup: Mapping[str, float] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    contributions: Mapping[str, Contributions] = field(default_factory=dict, repr=False)
    dominated_by: str = ""

    @property
    def cost(self) -> float:
        """Bytes times milliseconds at the largest batch; bytes alone where no time was measured."""
        return self.size_bytes * (self.slowest_ms or 1.0)

    @property
    def slowest_ms(self) -> float:
        """Median of the largest batch; 0 where none was measured."""
        return max((middle for _, middle, _ in self.latency_ms.values()), default=0.0)


def point_of(name: str, artifact: Artifact, measured: Metrics | None = None, reason: str = "") -> Point:
    """Return what an artifact's report says of it.

    Args:
        name: of its folder.
        artifact: with or without a report.
        measured: its metrics with what each part of the data adds, where those are at hand.
        reason: why it was not measured.
    """
    report = artifact.report or {}
    rows = {r["name"]: r for r in report.get("metrics", []) if isinstance(r.get("artifact"), int | float)}
    metrics = {metric: float(row["artifact"]) for metric, row in rows.items()}
    changes = {
        metric: value - float(rows[metric]["float_value"])
        for metric, value in metrics.items()
        if isinstance(rows[metric].get("float_value"), int | float)
    }
    noise = report.get("scalars", {}).get(f"quant/{SNR}")
    if not metrics and noise is not None:
        metrics[SNR] = float(noise)
    times = {str(r["batch"]): r["artifact"] for r in report.get("latency", [])}
    prefix, scalars = "quant/speedup/batch_", report.get("scalars", {})
    return Point(
        name,
        artifact.manifest["recipe"],
        artifact.manifest["runtime"],
        artifact,
        reason,
        metrics,
        changes,
        artifact.size_bytes,
        float(report.get("size_ratio") or math.nan),
        {batch: (t["low_ms"], t["median_ms"], t["high_ms"]) for batch, t in times.items()},
        {key.removeprefix(prefix): float(value) for key, value in scalars.items() if key.startswith(prefix)},
        tuple(report.get("failures", [])),
        {} if measured is None else measured.contributions,
    )


def directions_of(points: Sequence[Point], known: Mapping[str, bool | None]) -> dict[str, bool]:
    """Return the metrics that points are compared by: those of which it is known whether they are better when higher.

    Args:
        points: those of which were measured count.
        known: metric to whether it is better when higher.
    """
    names = dict.fromkeys(name for point in points for name in point.metrics)
    directions = {name: bool(known[name]) for name in names if known.get(name) is not None}
    return directions | ({SNR: True} if SNR in names else {})


def is_worse(one: Point, other: Point, metric: str, *, higher_is_better: bool) -> bool:
    """Tell whether a point is worse than another: by a one-sided paired interval of 95 % where the metric has parts."""
    if metric not in one.metrics or metric not in other.metrics:
        return metric in other.metrics
    values = one.metrics[metric], other.metrics[metric]
    if math.isnan(values[0]) or math.isnan(values[1]):
        return math.isnan(values[0]) and not math.isnan(values[1])
    change = difference(*values, one.contributions.get(metric), other.contributions.get(metric))
    worse = -change.value if higher_is_better else change.value
    return worse > (change.margin or 0.0)


def dominates(one: Point, other: Point, directions: Mapping[str, bool]) -> bool:
    """Tell whether a point is better than another in bytes, time or a metric, and worse in none of them.

    Times are equal where their quartiles overlap.
    """
    if one.size_bytes > other.size_bytes:
        return False
    batches = [batch for batch in one.latency_ms if batch in other.latency_ms]
    if any(one.latency_ms[b][0] > other.latency_ms[b][2] for b in batches):
        return False
    if any(is_worse(one, other, name, higher_is_better=higher) for name, higher in directions.items()):
        return False
    return (
        one.size_bytes < other.size_bytes
        or any(one.latency_ms[b][2] < other.latency_ms[b][0] for b in batches)
        or any(is_worse(other, one, name, higher_is_better=higher) for name, higher in directions.items())
    )


def front(points: Sequence[Point], directions: Mapping[str, bool]) -> dict[str, str]:
    """Return the names of points that another one dominates, each with that one's name, which nothing dominates."""
    beaten: dict[str, str] = {}
    kept: list[Point] = []
    made = [point for point in points if point.artifact is not None and not point.reason and not point.failures]
    # Whatever dominates a point is no larger, so that it comes before; of equally large ones the faster does.
    for point in sorted(made, key=lambda one: (one.size_bytes, one.slowest_ms)):
        better = next((other for other in kept if dominates(other, point, directions)), None)
        if better is None:
            kept.append(point)
        else:
            beaten[point.name] = better.name
    return beaten


def recommended(points: Sequence[Point], directions: Mapping[str, bool], objective: str | None = None) -> Point | None:
    """Return the point to take: of those that nothing is measurably better than by a metric, the cheapest.

    Where nothing but noise was measured, the cheapest of those that are at least 30 dB from float.
    Points whose report says FAILED, a limit among them, count where there are no others; dominated ones never do.

    Args:
        points: marked.
        directions: metrics to compare by, and whether they are better when higher.
        objective: "size", "latency" or a metric, what is to be best; bytes times milliseconds by default.
    """
    made = [point for point in points if point.artifact is not None]
    sound = [p for p in made if not p.failures and not p.reason] or [p for p in made if not p.reason] or made
    left = [point for point in sound if not point.dominated_by] or sound

    # Noise alone says that a model is good, not that one is better: more decibels than are needed buy nothing.
    quiet = (
        [point for point in left if point.metrics.get(SNR, math.inf) >= _GOOD_DB] if set(directions) == {SNR} else []
    )

    def falls_behind(point: Point) -> bool:
        return any(is_worse(point, o, name, higher_is_better=h) for o in left for name, h in directions.items())

    equal = quiet or [point for point in left if not falls_behind(point)] or left
    if objective is not None and objective in directions:
        better = -1 if directions[objective] else 1
        return min(equal, key=lambda point: better * point.metrics.get(objective, math.nan), default=None)
    costs: dict[str | None, Callable[[Point], float]] = {
        SIZE: lambda point: point.size_bytes,
        LATENCY: lambda point: point.slowest_ms,
    }
    return min(equal, key=costs.get(objective, lambda point: point.cost), default=None)
