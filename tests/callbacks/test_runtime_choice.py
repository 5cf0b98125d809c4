"""`runtime="auto"` in the callbacks: chosen when fit begins, or as in the run that is resumed."""

from pathlib import Path
from typing import Any

import lightning_models
import pytest
from fast_runtimes import faster, two  # noqa: F401  a fixture
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, runtimes

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured", "two"),
]


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
