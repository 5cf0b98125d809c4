"""Latency in a report."""

import pytest
from reports import GOOD_VALUES, changed, timing

from lightning_quant.report import speed
from lightning_quant.report.speed import LatencyRow, Speed
from lightning_quant.report.verdict import speedup, verdict

METRICS, LATENCY = GOOD_VALUES["metrics"], GOOD_VALUES["latency"]


def test_slower_artifact_is_a_warning_for_its_batch() -> None:
    slower = LatencyRow(1, timing(10), timing(4), timing(5))

    assert changed(latency=(slower, LATENCY[1])).warnings == [
        "the artifact is slower than float in onnxruntime at batch 1 (1.25 times the time): "
        'runtime="auto" takes the fastest of the installed runtimes'
    ]


def test_what_two_decimals_do_not_show_is_no_warning() -> None:
    even = LatencyRow(1, timing(10), timing(4), timing(4.01))

    assert even.speedup < 1
    assert changed(latency=(even, LATENCY[1])).warnings == []


def test_float_in_another_runtime_is_a_peer_and_named_with_the_way_out() -> None:
    faster_elsewhere = LatencyRow(1, timing(10), timing(6), timing(5), {"openvino": timing(4)})
    in_torch = LatencyRow(8, timing(10), timing(30), timing(20), {"openvino": timing(25)})
    report = changed(latency=(faster_elsewhere, in_torch))
    (warning,) = report.warnings

    assert "in openvino at batch 1 (1.25 times the time) and in torch at batch 8 (2.00 times the time)" in warning
    assert 'runtime="auto"' in warning
    assert "| openvino float, ms |" in report.to_markdown()
    assert verdict(report.to_dict())[0] == "fair"
    assert speedup(report.to_dict()["latency"][0]) == faster_elsewhere.speedup == 0.8
    assert len(report.figures()["latency"]().axes[0].containers) == 2 * 4


def test_of_the_fastest_runtime_no_faster_one_is_promised() -> None:
    slower = (LatencyRow(1, timing(10), timing(4), timing(5)),)

    assert Speed(slower, "onnxruntime", 1, "A processor", chosen=True).warnings() == [
        "the artifact is slower than float in onnxruntime at batch 1 (1.25 times the time)"
    ]


def test_float_in_other_runtimes_matters_where_the_artifact_is_hardly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CLOSE", 2.0)

    assert [LatencyRow(1, timing(ms), None, timing(10)).is_close for ms in (9, 11, 19, 21)] == [
        False,
        True,
        True,
        False,
    ]


def test_artifact_faster_than_one_float_peer_only_is_slower() -> None:
    # Twice as fast as torch, but the same runtime in float is faster still.
    (warning,) = changed(latency=(LatencyRow(8, timing(10), timing(4), timing(5)),)).warnings

    assert "slower than float in onnxruntime at batch 8" in warning


def test_best_float_peer_is_the_faster_one() -> None:
    assert LATENCY[0].best_float_ms == 4
    assert LATENCY[0].speedup == 2
    assert LATENCY[1].best_float_ms == 100
    assert LATENCY[1].speedup == 2


def test_without_a_runtime_peer_torch_is_the_best_float() -> None:
    row = LatencyRow(1, timing(10), None, timing(2))

    assert row.best_float_ms == 10
    assert row.speedup == 5
