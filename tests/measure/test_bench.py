"""Rows of the bench command, and what they know of float from an artifact's report."""

from pathlib import Path
from typing import Any

import pytest
import torch
from features import feature

from lightning_quant import quantize
from lightning_quant.errors import QuantizationError
from lightning_quant.measure import bench as module
from lightning_quant.measure.bench import BenchRow, _recorded_float, _repeated, as_dict, bench


def test_a_speedup_is_float_time_over_this_one_and_unknown_without() -> None:
    row = BenchRow("folder", "torch", 1, 8, 2.0, 1.9, 2.2, 4000.0, 10**6, 5.0)
    assert as_dict(row)["speedup"] == 2.5
    assert BenchRow("folder", "torch", 1, 8, 2.0, 1.9, 2.2, 4000.0, 10**6, None).speedup is None


def test_float_times_count_for_the_same_batch_threads_and_processor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_name", lambda: "this one")
    latency = [{"batch": 8, "torch_float": {"median_ms": 4.0}, "runtime_float": {"median_ms": 3.0}}]
    report = {"threads": 2, "cpu": "this one", "latency": latency}

    assert _recorded_float(report, 8, 2) == 3.0
    assert _recorded_float({**report, "latency": [{**latency[0], "runtime_float": None}]}, 8, 2) == 4.0
    assert [_recorded_float(report, 4, 2), _recorded_float(report, 8, 1), _recorded_float(None, 8, 2)] == [None] * 3
    assert _recorded_float({**report, "cpu": "another"}, 8, 2) is None


def test_samples_are_repeated_to_any_batch() -> None:
    assert _repeated(torch.tensor([[1], [2], [3]]), 5).flatten().tolist() == [1, 2, 3, 1, 2]
    assert _repeated(torch.tensor([[1], [2], [3]]), 2).flatten().tolist() == [1, 2]


def test_a_folder_that_is_no_artifact_is_refused_before_anything_is_timed(tmp_path: object) -> None:
    with pytest.raises(QuantizationError, match="artifact"):
        bench([str(tmp_path)])


@pytest.mark.slow
@feature("Trainer", "limits on the peak of memory, measured in a process of its own", only="PTQ")
@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
@pytest.mark.usefixtures("unmeasured")
def test_the_peak_of_a_larger_file_is_higher_and_held_against_its_limit(tmp_path: Path) -> None:
    peaks, ratios = [], []
    for width in (8, 2048):
        model, x = torch.nn.Sequential(torch.nn.Linear(width, width)), torch.randn(4, width)
        how: dict[str, Any] = {"calibration_data": [x], "output_dir": tmp_path / str(width)}
        limits = {"peak_memory_mb": 1.0, "peak_memory_ratio": 0.01}
        artifact = quantize(model, "int8_weight_only", "torch", **how, limits=limits)
        report: Any = artifact.report
        peaks.append(report["scalars"]["quant/peak_memory_mb"])
        assert report["search"]["trials"][0]["measured"]["peak_memory_mb"] == pytest.approx(peaks[-1], abs=4.0)
        ratios.append(report["scalars"]["quant/peak_memory_ratio"])
        assert any("at its peak, more than 1" in text for text in report["failures"])
        assert any("of float's memory at its peak, more than 0.01" in text for text in report["failures"])
    # At least by the weights, a byte each, where float has four.
    assert peaks[1] - peaks[0] > 3.5
    assert ratios[1] < ratios[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
@pytest.mark.usefixtures("unmeasured")
def test_the_peak_of_a_file_that_is_mostly_weights_is_a_fraction_of_floats(tmp_path: Path) -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(4096, 4096)), torch.randn(4, 4096)
    limits = {"peak_memory_ratio": 0.01}
    artifact = quantize(model, "int8_weight_only", "torch", calibration_data=[x], output_dir=tmp_path, limits=limits)
    assert 0.25 < artifact.report["scalars"]["quant/peak_memory_ratio"] < 0.7
