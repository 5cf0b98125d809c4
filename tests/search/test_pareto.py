import random
from pathlib import Path
from typing import Any

import pytest

from lightning_quant.artifact.artifact import Artifact
from lightning_quant.measure.contributions import of_samples
from lightning_quant.search.pareto import Point, directions_of, dominates, front, is_worse, recommended

ARTIFACT = Artifact(Path(), {})


def point(name: str, size: int, accuracy: float, ms: float = 1.0, **more: Any) -> Point:
    times = {"1": (0.95 * ms, ms, 1.05 * ms)}
    return Point(name, name, "torch", ARTIFACT, "", {"accuracy": accuracy}, {}, size, latency_ms=times, **more)


def of_samples_point(name: str, size: int, correct: list[int]) -> Point:
    return point(name, size, sum(correct) / len(correct), contributions={"accuracy": of_samples(correct)})


UP = {"accuracy": True}


def test_a_point_dominates_what_is_larger_slower_and_no_better() -> None:
    small, large = point("small", 10, 0.9), point("large", 20, 0.9)
    assert dominates(small, large, UP)
    assert not dominates(large, small, UP)
    assert not dominates(small, point("better", 20, 0.91), UP)
    assert not dominates(small, point("faster", 20, 0.9, ms=0.5), UP)
    # Times whose quartiles overlap are equal.
    assert dominates(small, point("hardly faster", 20, 0.9, ms=0.97), UP)
    assert dominates(point("lower", 10, 0.2), point("higher", 10, 0.3), {"accuracy": False})


def test_differences_within_chance_are_none_by_the_paired_test() -> None:
    chance = random.Random(0)
    base = [int(chance.random() < 0.9) for _ in range(400)]
    # As many gained as lost but for one, and thirty lost.
    noisy, worse = list(base), list(base)
    for index in range(20):
        noisy[index] = 1 - noisy[index]
    for index in [i for i, value in enumerate(base) if value][:30]:
        worse[index] = 0
    large, small, bad = (of_samples_point(*a) for a in (("large", 20, base), ("small", 10, noisy), ("bad", 10, worse)))
    assert small.metrics["accuracy"] < large.metrics["accuracy"]
    assert dominates(small, large, UP)
    assert not dominates(bad, large, UP)
    assert is_worse(bad, large, "accuracy", higher_is_better=True)
    # Without contributions any difference counts.
    assert not dominates(point("small", 10, small.metrics["accuracy"]), large, UP)


def test_what_beats_a_point_is_beaten_by_nothing() -> None:
    points = [point(name, size, accuracy) for name, size, accuracy in (("a", 1, 0.5), ("b", 2, 0.5), ("c", 3, 0.4))]
    points.append(Point("none", "", "", reason="it failed"))
    points.append(point("failed", 1, 0.9, failures=("parity FAILED",)))
    assert front(points, UP) == {"b": "a", "c": "a"}


@pytest.mark.parametrize(
    ("objective", "expected"), [(None, "middle"), ("size", "small"), ("latency", "quick"), ("accuracy", "best")]
)
def test_the_recommended_is_cheapest_of_those_that_are_as_good(objective: str | None, expected: str) -> None:
    points = [
        point("small", 10, 0.9, 9.0),
        point("middle", 20, 0.9, 3.0),
        point("quick", 80, 0.9, 1.0),
        point("tiny", 1, 0.5, 1.0),
        point("failed", 1, 0.95, 0.1, failures=("limits FAILED",)),
    ]
    if objective == "accuracy":
        points.append(point("best", 90, 0.93, 9.0))
    found = recommended(points, UP, objective)
    assert found is not None
    assert found.name == expected
    assert recommended([points[-1]], UP) == points[-1]
    assert recommended([Point("none", "", "", reason="it failed")], UP) is None


def test_metrics_of_no_known_direction_decide_nothing() -> None:
    points = [point("a", 1, 0.5)]
    assert directions_of(points, {"accuracy": None}) == {}
    assert directions_of(points, {"accuracy": False, "other": True}) == {"accuracy": False}
    assert directions_of([Point("a", "", "", ARTIFACT, metrics={"snr_db": 20.0})], {}) == {"snr_db": True}


def test_decibels_beyond_what_is_good_buy_nothing() -> None:
    only = {"snr_db": True}
    points = [
        Point(name, "", "", artifact=object(), size_bytes=size, metrics={"snr_db": db})
        for name, size, db in (("loud", 1, 12.0), ("small", 10, 31.0), ("quiet", 20, 80.0))
    ]
    assert [found.name for found in (recommended(points, only), recommended(points, only, "snr_db")) if found] == [
        "small",
        "quiet",
    ]
    assert recommended(points[:1], only) == points[0]
