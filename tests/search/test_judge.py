import pytest

from lightning_quant.measure.contributions import Difference
from lightning_quant.measure.interim import SHARES
from lightning_quant.report.limits import Limits, limits_from
from lightning_quant.search.choice import Measured
from lightning_quant.search.judge import Judge, confidence_of, interim_confidence_of


def verdict(limits: Limits, difference: Difference, **known: bool | None) -> tuple[bool, float | None, str]:
    times = {"latency_ms": {"1": 2.0}, "speedup": {"1": 1.2, "8": 1.6}}
    memory = {"peak_memory_mb": 20.0, "peak_memory_ratio": 0.5}
    measured = Measured({"m": 0.0}, {"m": difference}, 300, 0.3, **times, **memory)  # type: ignore[arg-type]
    (found,) = Judge(limits, known)(measured)
    return found.kept, found.reached, found.basis


@pytest.mark.parametrize(
    ("limit", "value", "margin", "kept"),
    [
        (-0.01, -0.008, 0.001, True),
        (-0.01, -0.008, 0.003, False),  # the estimate keeps it, the interval does not
        (-0.01, 0.5, 0.003, True),
        (0.01, 0.008, 0.001, True),
        (0.01, 0.012, None, False),
        (-0.05, 0.85 - 0.9, None, True),
    ],
)
def test_a_limit_is_kept_when_the_interval_says_so(
    limit: float, value: float, margin: float | None, kept: bool
) -> None:
    found = verdict(limits_from({"m": limit}), Difference(value, margin, "" if margin else "no batches"))
    assert found[0] == kept
    assert ("interval" in found[2]) == (margin is not None)
    assert ("no batches" in found[2]) == (margin is None)


@pytest.mark.parametrize(
    ("samples", "says"), [(1000, "1,843 samples at least, and 1,000 were read"), (1842, "1,843"), (1843, "")]
)
def test_samples_that_are_too_few_for_a_limit_are_named(samples: int, says: str) -> None:
    # Nothing differs, and with 97.5 % that shows less than -log(0.025) / samples.
    nothing = Difference(0.0, 0.0, degrees=63, samples=samples)
    kept, reached, basis = verdict(limits_from({"m": -0.002}), nothing)
    assert reached == pytest.approx(1 - 0.025 ** (1 / samples), rel=1e-6)
    assert kept == (not says)
    assert says in basis
    assert ("were read" in basis) == bool(says)


def test_a_metric_without_a_direction_keeps_no_limit() -> None:
    assert verdict(Limits({"m": 0.1}), Difference(0.0))[0] is False
    assert verdict(Limits({"m": 0.1}), Difference(0.0), m=True)[0] is True


@pytest.mark.parametrize(
    ("name", "kept", "missed"),
    [
        ("size_ratio", 0.3, 0.29),
        ("size_bytes", 300, 299),
        ("latency_ms", 2, 1.9),
        ("speedup", 1.2, 1.3),
        ("peak_memory_mb", 20, 19),
        ("peak_memory_ratio", 0.5, 0.4),
    ],
)
def test_bounds_of_size_and_speed(name: str, kept: float, missed: float) -> None:
    assert verdict(limits_from({name: kept}), Difference(0.0))[0]
    assert not verdict(limits_from({name: missed}), Difference(0.0))[0]


@pytest.mark.parametrize("name", ["peak_memory_mb", "peak_memory_ratio"])
def test_a_peak_that_was_not_measured_misses_its_limit_and_says_why(name: str) -> None:
    measured = Measured({}, {}, 300, 0.3, no_peak="it has no program")
    (found,) = Judge(limits_from({name: 0.5}), {})(measured)
    assert (found.kept, found.reached, found.basis) == (False, None, "not measured: it has no program")


def test_several_looks_at_the_same_data_are_wrong_no_more_often_than_one() -> None:
    assert 1 - confidence_of(1) == pytest.approx(0.025)
    assert sum(1 - confidence_of(look) for look in range(1, 10_000)) == pytest.approx(0.05, abs=1e-5)
    measured = Measured({"m": 0.0}, {"m": Difference(-0.008, 0.0015, degrees=63)}, 300, 0.3)
    judge = Judge(limits_from({"m": -0.01}), {})
    assert [judge(measured, look)[0].kept for look in (1, 2, 10)] == [True, False, False]


@pytest.mark.parametrize(
    ("value", "margin", "decided"),
    [(-0.002, 0.001, True), (-0.03, 0.001, False), (-0.009, 0.001, None), (-0.011, 0.001, None), (-0.5, None, None)],
)
def test_an_interim_look_decides_where_its_interval_is_on_one_side_of_the_limit(
    value: float, margin: float | None, decided: bool | None
) -> None:
    judge, apart = Judge(limits_from({"m": -0.01}), {}), {"m": Difference(value, margin, degrees=63)}
    assert judge.decides(apart, 1) is decided
    # All looks together, at any number of files, are wrong no more often than one.
    looks = [1 - interim_confidence_of(look) for look in range(1, 10_000) for _ in SHARES]
    assert sum(looks) == pytest.approx(0.05, abs=1e-5)


def test_limits_on_several_metrics_are_kept_together_and_missed_alone() -> None:
    judge = Judge(limits_from({"m": -0.01, "n": 0.01}), {})
    good, bad, open_ = Difference(0.0, 0.001), Difference(0.5, 0.001), Difference(0.0105, 0.001)
    assert judge.decides({"m": good, "n": good}, 1) is True
    assert judge.decides({"m": good, "n": bad}, 1) is False
    assert judge.decides({"m": good, "n": open_}, 1) is None
    assert judge.decides({"m": good}, 1) is None
    accuracies = Judge(Limits(max_accuracy_drop=0.01), {})
    assert accuracies.drops(["val_acc", "loss"]) == {"val_acc": 0.01}
    assert accuracies.decides({"loss": good}, 1) is None
