"""Limits that were missed fail a report; none were set says nothing."""

from lightning_quant.report.kept_limits import KeptLimits
from lightning_quant.report.limits import NO_LIMITS, Limits


def test_every_missed_limit_is_a_failure_and_counted() -> None:
    kept = KeptLimits(Limits(min_speedup=2.0, max_size_ratio=0.5), ("speedup is 1.5", "size ratio is 0.6"))
    assert kept.failures() == ["limits FAILED: speedup is 1.5", "limits FAILED: size ratio is 0.6"]
    assert kept.scalars() == {"limits_missed": 2.0}
    assert set(kept.to_dict()) == {"limits"}
    assert kept.to_dict()["limits"]["min_speedup"] == 2.0


def test_limits_that_are_kept_are_counted_too_and_none_are_not() -> None:
    assert KeptLimits(Limits(min_speedup=2.0), ()).scalars() == {"limits_missed": 0.0}
    assert KeptLimits(NO_LIMITS, ()).scalars() == {}
