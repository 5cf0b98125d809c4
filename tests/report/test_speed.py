"""Latency in a report."""

from reports import GOOD_VALUES, changed, timing

from lightning_quant.report.speed import LatencyRow

METRICS, LATENCY = GOOD_VALUES["metrics"], GOOD_VALUES["latency"]


def test_slower_artifact_is_a_warning_for_its_batch() -> None:
    slower = LatencyRow(1, timing(10), timing(4), timing(5))

    assert changed(latency=(slower, LATENCY[1])).warnings == [
        "the artifact is slower than float at batch 1: 1.25 times the time"
    ]


def test_artifact_faster_than_one_float_peer_only_is_slower() -> None:
    # Twice as fast as torch, but the same runtime in float is faster still.
    (warning,) = changed(latency=(LatencyRow(8, timing(10), timing(4), timing(5)),)).warnings

    assert "slower than float at batch 8" in warning


def test_best_float_peer_is_the_faster_one() -> None:
    assert LATENCY[0].best_float_ms == 4
    assert LATENCY[0].speedup == 2
    assert LATENCY[1].best_float_ms == 100
    assert LATENCY[1].speedup == 2


def test_without_a_runtime_peer_torch_is_the_best_float() -> None:
    row = LatencyRow(1, timing(10), None, timing(2))

    assert row.best_float_ms == 10
    assert row.speedup == 5
