"""Runs that end before rounding begins have the artifact of quantization after training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from features import feature
from lightning.pytorch import Callback
from lightning_models import fit, images, seeded

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, load
from lightning_quant.callbacks import untrained

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


class Stop(Callback):
    """Stops in the first epoch, as `EarlyStopping` or `max_time` may."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True


def answers(callback: Any, folder: Path) -> torch.Tensor:
    """Return what the artifact says of a run of 100 epochs that stops after one."""
    fit(seeded(), Stop(), callback, max_epochs=100, default_root_dir=folder)
    assert callback.artifact is not None
    return load(callback.artifact.path, threads=1)(images(8)[:][0])


@feature("Other callbacks", "EarlyStopping before rounding begins", only="QAT")
def test_what_ends_before_rounding_is_quantized_as_after_training(tmp_path: Path) -> None:
    trained = QuantizationAwareTraining(output_dir=tmp_path / "qat", threads=1, evaluate=False)
    with pytest.warns(UserWarning, match="say when it begins, as schedule=") as warned:
        rounded = answers(trained, tmp_path)
    assert len([w for w in warned if "nothing was trained" in str(w.message)]) == 1
    after = PostTrainingQuantization(output_dir=tmp_path / "ptq", threads=1, evaluate=False)
    assert torch.equal(rounded, answers(after, tmp_path))
    assert trained.artifact is not None
    assert not trained.artifact.report["trained"]
    assert f"{untrained.NOTE}, so it was quantized as after training" in trained.artifact.report["notes"]


def test_a_calibration_that_fails_leaves_the_ranges_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(untrained, "calibrated", fails)
    callback = QuantizationAwareTraining(output_dir=tmp_path / "qat", threads=1, evaluate=False)
    with pytest.warns(UserWarning, match="the disk is gone"):
        answers(callback, tmp_path)
    assert callback.artifact is not None
    assert untrained.NOTE in callback.artifact.report["notes"]
