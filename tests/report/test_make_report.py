"""What a report is made of is measured on the file itself."""

import contextlib
from pathlib import Path
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
from reports import changed
from torch import nn

import lightning_quant as lq
from lightning_quant.artifact.recorded_report import best_float_ms
from lightning_quant.errors import NoEffectWarning
from lightning_quant.export.float_peers import FloatPeers
from lightning_quant.export.static_model import StaticModel
from lightning_quant.machine.latency import Timing
from lightning_quant.report import make_report, speed
from lightning_quant.report.limits import Limits
from lightning_quant.report.make_report import tensor_bytes, with_limits


def test_bytes_of_float_count_shared_tensors_once_and_buffers_too() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False), nn.BatchNorm1d(4))
    separate = tensor_bytes(model)
    model[1].weight = model[0].weight

    assert separate - tensor_bytes(model) == 8 * 4 * 4
    assert tensor_bytes(nn.BatchNorm1d(4)) == 4 * 4 * 4 + torch.int64.itemsize


def test_a_comparison_that_fails_costs_no_artifact_and_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(StaticModel, "parity", fail)
    monkeypatch.setattr(make_report, "measure_noise", fail)
    torch.manual_seed(0)
    with pytest.warns(NoEffectWarning):
        artifact = lq.quantize(nn.Linear(8, 4), calibration_data=[torch.randn(4, 8)], output_dir=tmp_path / "q")
    assert artifact.report is not None
    failure = "parity FAILED: the comparison of the file with its simulation is missing: RuntimeError('no memory')"
    assert artifact.report["failures"] == [failure]
    assert any(text.startswith("the noise of the outputs is missing") for text in artifact.report["warnings"])
    assert lq.load(artifact.path)(torch.randn(4, 8)).shape == (4, 4)


@pytest.mark.parametrize("close", [True, False])
def test_an_artifact_hardly_faster_than_its_own_float_is_timed_beside_float_in_other_runtimes(
    close: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    milliseconds = {"torch": 12.0, "float": 11.0, "artifact": 10.0, "float in openvino": 8.0}

    def timed(contestants: dict[str, Any], **_: Any) -> dict[str, Timing]:
        return {name: Timing(milliseconds[name], 1.0, 20.0, 7) for name in contestants}

    monkeypatch.setattr(make_report, "measure", timed)
    monkeypatch.setattr(speed, "CLOSE", 2.0 if close else 1.05)
    monkeypatch.setattr(FloatPeers, "elsewhere", lambda *_: ({"openvino": nn.Identity()}, ("nothing else",)))
    with pytest.warns(NoEffectWarning) if close else contextlib.nullcontext():
        artifact = lq.quantize(nn.Linear(64, 64), calibration_data=[torch.randn(4, 64)], output_dir=tmp_path / "q")
    assert artifact.report is not None
    said = [text for text in artifact.report["warnings"] if "slower than float in openvino" in text]
    assert len(said) == close
    assert ("nothing else" in artifact.report["notes"]) == close
    assert best_float_ms(artifact.report["latency"][0]) == (8.0 if close else 11.0)


def test_a_report_is_held_against_limits_of_size_and_speed() -> None:
    good = changed()
    held = with_limits(good, Limits(max_size_ratio=0.1))

    assert good.warnings == []
    assert any("limits FAILED" in text for text in held.warnings)
