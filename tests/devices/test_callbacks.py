"""Every flow of the callbacks on a device that is not the CPU: each ends with an artifact, measured."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import fit, seeded

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, verify

pytestmark = [
    pytest.mark.usefixtures("unmeasured"),
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.filterwarnings("ignore:.*ou passed .*precision.*:UserWarning"),
]

SCHEDULE = {"observe": 0, "fake_quantize": 1, "freeze_observers": 3, "freeze_batch_norm": 4, "unit": "steps"}


def check(callback: Any) -> None:
    """Make sure that there is an artifact which computes what it did when it was written, with true metrics."""
    artifact = callback.artifact
    assert artifact is not None
    assert verify(artifact.path).identical
    metrics = {row["name"]: row for row in artifact.report["metrics"]}
    loss = metrics["val_loss"]
    expected = loss["float_value"] if loss["simulated"] is None else loss["simulated"]
    assert loss["artifact"] == pytest.approx(expected, rel=0.1)
    assert not [warning for warning in artifact.report["warnings"] if "parity" in warning.lower()]


def trained(where: Any, folder: Path, *, precision: str = "32-true", **arguments: Any) -> QuantizationAwareTraining:
    callback = QuantizationAwareTraining(output_dir=folder / "artifact", schedule=SCHEDULE, **arguments)
    fit(seeded(), callback, max_epochs=2, **where.options(precision))
    return callback


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_training_in_each_precision(where: Any, tmp_path: Path, precision: str) -> None:
    check(trained(where, tmp_path, precision=precision))


def test_training_of_learned_steps(where: Any, tmp_path: Path) -> None:
    check(trained(where, tmp_path, recipe="int4_weights"))


def test_batch_norm_is_measured_anew(where: Any, tmp_path: Path) -> None:
    recipe = {"name": "with_batch_norm", "batch_norm_batches": 2}
    check(trained(where, tmp_path, recipe=recipe, sensitivity=True))


def test_best_weights(where: Any, tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(output_dir=tmp_path / "artifact", schedule=SCHEDULE, weights="best")
    saving = ModelCheckpoint(tmp_path / "checkpoints", monitor="score", mode="max")
    fit(seeded(best_epoch=1), callback, saving, max_epochs=3, enable_checkpointing=True, **where.options())
    check(callback)
    assert any("best ones" in note for note in callback.artifact.report["notes"])


@pytest.mark.parametrize("recipe", ["int8", "int8_accurate"])
def test_calibration(where: Any, tmp_path: Path, recipe: str) -> None:
    callback = PostTrainingQuantization(recipe, output_dir=tmp_path / "artifact", sensitivity=True)
    fit(seeded(), callback, **where.options())
    check(callback)
    assert callback.artifact.report["sensitivity"]["layers"]


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_static_recipe_on_other_runtimes(where: Any, tmp_path: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    callback = PostTrainingQuantization("int8", runtime, output_dir=tmp_path / "artifact")
    fit(seeded(), callback, **where.options())
    check(callback)


def test_quantizing_a_checkpoint(where: Any, tmp_path: Path) -> None:
    training = QuantizationAwareTraining(output_dir=tmp_path / "artifact", schedule=SCHEDULE, evaluate=False)
    trainer = fit(seeded(), training, max_epochs=2, **where.options())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for kind in (QuantizationAwareTraining, PostTrainingQuantization):
        callback = kind(output_dir=tmp_path / kind.__name__)
        callback.quantize_checkpoint(tmp_path / "last.ckpt", seeded(seed=1), **where.options())
        check(callback)
