from pathlib import Path
from typing import Any

import lightning_models
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, load, quantize, runtimes
from lightning_quant import auto as automatic
from lightning_quant.auto import choose_runtime
from lightning_quant.errors import QuantizationError
from lightning_quant.latency import Timing
from lightning_quant.runtimes import openvino

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runtimes that export quickly."""
    monkeypatch.setattr(runtimes, "names", lambda: ["onnxruntime", "openvino"])


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def faster(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a runtime be the fastest by far; the contestants are called all the same."""

    def timed(contestants: dict[str, Any]) -> dict[str, Timing]:
        for call in contestants.values():
            call()
        return {n: Timing(1.0 if n == name else 9.0, 1.0, 9.0, 7) for n in contestants}

    monkeypatch.setattr(automatic, "measure", timed)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_fastest_runtime_is_taken_and_the_report_says_what_was_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster(monkeypatch, name)
    artifact = quantize(model(), runtime="auto", calibration_data=iter([X, 2 * X]), output_dir=tmp_path, threads=1)

    assert artifact.manifest["runtime"] == name
    (note,) = artifact.report["notes"]
    assert note.startswith(f"{name} was chosen as the fastest")
    assert "onnxruntime 1" in note or "onnxruntime 9" in note
    assert "openvino 1" in note or "openvino 9" in note
    assert load(tmp_path)(X).shape == (16, 3)


def test_fast_runtime_that_computes_something_else_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = openvino.OpenVinoModule.run
    monkeypatch.setattr(openvino.OpenVinoModule, "run", lambda self, tensors: [-y for y in run(self, tensors)])
    faster(monkeypatch, "openvino")
    artifact = quantize(model(), runtime="auto", calibration_data=[X], output_dir=tmp_path, threads=1)

    assert artifact.manifest["runtime"] == "onnxruntime"
    (note,) = artifact.report["notes"]
    assert "Not considered: openvino (parity FAILED" in note


def test_runtime_that_is_missing_or_refuses_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise QuantizationError("no such operator")

    monkeypatch.setattr(openvino.RUNTIME, "export", refuse)
    artifact = quantize(model(), runtime="auto", calibration_data=[X], output_dir=tmp_path, threads=1)

    assert artifact.manifest["runtime"] == "onnxruntime"
    assert "Not considered: openvino (no such operator)" in artifact.report["notes"][0]


def test_every_reason_is_given_when_there_is_none() -> None:
    def plan(name: str) -> Any:
        raise QuantizationError(f"{name} cannot")

    with pytest.raises(QuantizationError, match=r"onnxruntime: onnxruntime cannot; openvino: openvino cannot"):
        choose_runtime(plan)


def test_the_real_measurement_names_one_of_them(tmp_path: Path) -> None:
    artifact = quantize(model(), runtime="auto", calibration_data=[X], output_dir=tmp_path, threads=1)

    assert artifact.manifest["runtime"] in ("onnxruntime", "openvino")
    assert " ms" in artifact.report["notes"][0]


# --- in the callbacks


@pytest.mark.parametrize("kind", [PostTrainingQuantization, QuantizationAwareTraining])
def test_callbacks_choose_when_fit_begins_and_the_report_says_what_was_measured(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster(monkeypatch, "openvino")
    callback = kind(runtime="auto", output_dir=tmp_path / "artifact", threads=1)
    chosen: list[str] = []

    class Watch(Callback):
        def on_train_start(self, *_: Any) -> None:
            chosen.append(callback.require_prepared().plan.runtime)

    lightning_models.fit(lightning_models.Classifier(), callback, Watch())

    assert chosen == ["openvino"]
    assert callback.artifact.manifest["runtime"] == "openvino"
    assert any(note.startswith("openvino was chosen as the fastest") for note in callback.artifact.report["notes"])


def test_a_resumed_run_goes_on_with_the_runtime_that_has_its_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster(monkeypatch, "openvino")
    first = QuantizationAwareTraining(runtime="auto", output_dir=tmp_path / "first", threads=1)
    trainer = lightning_models.fit(lightning_models.Classifier(), first)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    faster(monkeypatch, "onnxruntime")
    again = QuantizationAwareTraining(runtime="auto", output_dir=tmp_path / "again", threads=1)
    model = lightning_models.Classifier()
    artifact = again.quantize_checkpoint(tmp_path / "last.ckpt", model)

    assert artifact.manifest["runtime"] == "openvino"


def test_no_runtime_at_all_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "names", list)
    callback = PostTrainingQuantization(runtime="auto", output_dir=tmp_path)
    with pytest.raises(MisconfigurationException, match="a runtime to give a correct artifact, but none did"):
        lightning_models.fit(lightning_models.Classifier(), callback)
