"""An artifact from a checkpoint, without training."""

from pathlib import Path
from typing import Any

import pytest
from features import feature
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import Classifier, equal_tensors, fit, make_trainer, seeded, tensors_of

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]


class OddHyperparameters(Classifier):
    """Saves an object among its hyperparameters, which `weights_only` loading refuses."""

    def __init__(self, odd: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


class Odd:
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd)


@feature("Checkpoints", "an artifact from a checkpoint, without training: `quantize_checkpoint`")
def test_artifact_from_a_checkpoint_is_that_of_the_run(kind: Any, tmp_path: Path) -> None:
    def callback(name: str) -> Any:
        return kind(output_dir=tmp_path / name, evaluate=False, threads=1)

    saving = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    run = callback("run")
    module = seeded(OddHyperparameters, odd=Odd())
    fit(module, run, saving, max_epochs=2, enable_checkpointing=True)
    again = callback("again")
    with pytest.raises(Exception, match=r"names .*Odd.*`trust_checkpoint=True`"):
        again.quantize_checkpoint(saving.last_model_path, seeded(seed=1), accelerator="cpu")
    artifact = again.quantize_checkpoint(
        saving.last_model_path, seeded(seed=1), accelerator="cpu", trust_checkpoint=True
    )

    assert artifact.model_path.read_bytes() == run.artifact.model_path.read_bytes()
    assert any("last.ckpt" in note for note in artifact.report["notes"])


@feature("Checkpoints", "an artifact from a checkpoint of a run that never saw this package", only="PTQ")
def test_artifact_from_a_float_checkpoint_is_evaluated(tmp_path: Path) -> None:
    module = seeded()
    fit(module, max_epochs=2).save_checkpoint(tmp_path / "float.ckpt")
    callback = PostTrainingQuantization(output_dir=tmp_path / "artifact")
    other = seeded(seed=1)
    artifact = callback.quantize_checkpoint(tmp_path / "float.ckpt", other, accelerator="cpu")
    (by_hand,) = make_trainer().validate(module, verbose=False)
    metrics = {row["name"]: row for row in artifact.report["metrics"]}

    assert metrics["val_loss"]["float_value"] == pytest.approx(by_hand["val_loss"], abs=1e-6)
    assert metrics["val_accuracy"]["artifact"] is not None
    assert equal_tensors(tensors_of(other), tensors_of(module))


def test_ranges_that_a_checkpoint_does_not_have(tmp_path: Path) -> None:
    fit(seeded(), max_epochs=1).save_checkpoint(tmp_path / "float.ckpt")
    callback = QuantizationAwareTraining(output_dir=tmp_path / "artifact")
    with pytest.raises(Exception, match=r"checkpoint with the ranges .*PostTrainingQuantization"):
        callback.quantize_checkpoint(tmp_path / "float.ckpt", seeded(), accelerator="cpu")

    assert not (tmp_path / "artifact").exists()


@feature("Checkpoints", 'weights="best" with hyperparameters of any class')
def test_best_weights_with_hyperparameters_that_are_objects(kind: Any, tmp_path: Path) -> None:
    callback = kind(output_dir=tmp_path / "artifact", weights="best", evaluate=False)
    saving = ModelCheckpoint(tmp_path / "ckpt", monitor="score", mode="max")
    module = seeded(OddHyperparameters, odd=Odd())
    module.best_epoch = 1
    fit(module, callback, saving, max_epochs=2, enable_checkpointing=True)

    assert any("weights are the best ones" in note for note in callback.artifact.report["notes"])
