"""Which weights are exported when fit ends, and what the artifact is evaluated on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import BATCH, Classifier, activation_scales, decibels, fit, images, seeded, validate_by_hand

from lightning_quant import QuantizationAwareTraining, Schedule, load

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


def scales_of(observers: dict[str, Any]) -> list[float]:
    """Return the scales of all ranges, by the definition: a range with zero in it, in 255 steps."""
    ends = [(min(float(state["low"]), 0.0), max(float(state["high"]), 0.0)) for state in observers.values()]
    return [(high - low) / 255 for low, high in ends]


def best_run(folder: Path, best_epoch: int) -> tuple[Any, dict[str, Any], Classifier]:
    """Train with ModelCheckpoint's choice known; return the report, the best checkpoint and the module."""
    callback = QuantizationAwareTraining(
        output_dir=folder / "artifact", schedule=Schedule(0, 1, 4, 4, unit="epochs"), weights="best", evaluate=False
    )
    checkpoint = ModelCheckpoint(folder / "checkpoints", monitor="score", mode="max")
    module = seeded(best_epoch=best_epoch)
    fit(module, callback, checkpoint, max_epochs=4, enable_checkpointing=True)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert saved["epoch"] == best_epoch
    return callback, saved, module


def agreement(callback: Any, saved: dict[str, Any], module: Classifier) -> tuple[float, float]:
    """Return by how many decibels the artifact agrees with the best and with the last weights in float."""
    best = Classifier()
    best.load_state_dict(saved["state_dict"])
    x = images(BATCH, seed=1).tensors[0]
    with torch.no_grad():
        exported = load(callback.artifact.path)(x)
        return decibels(best.eval().net(x), exported), decibels(module.eval().net(x), exported)


def test_best_weights_and_ranges_come_from_the_same_checkpoint(tmp_path: Path) -> None:
    callback, saved, module = best_run(tmp_path, best_epoch=1)
    from_best, from_last = agreement(callback, saved, module)
    known = scales_of(saved["callbacks"][callback.state_key]["observers"])
    written = activation_scales(callback.artifact.model_path)

    assert from_best > 20
    assert from_best > from_last + 10
    assert all(any(scale == pytest.approx(other, rel=1e-5) for other in known) for scale in written)
    assert any("best" in note and "epoch=1" in note for note in callback.artifact.report["notes"])
    # The user keeps the last weights.
    assert not torch.equal(module.net.conv1.weight, saved["state_dict"]["net.conv1.weight"])
    assert not any("forward" in child.__dict__ for child in module.modules())


def test_checkpoint_from_before_fake_quantization_is_no_candidate(tmp_path: Path) -> None:
    callback, saved, module = best_run(tmp_path, best_epoch=0)
    from_best, from_last = agreement(callback, saved, module)

    assert from_last > 20
    assert from_last > from_best + 10
    assert any("last" in note and "before fake quantization" in note for note in callback.artifact.report["notes"])


def test_evaluation_can_be_limited(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(output_dir=tmp_path, limit_eval_batches=1)
    module = seeded()
    fit(module, callback)
    metrics = {row["name"]: row["artifact"] for row in callback.artifact.report["metrics"]}
    first = validate_by_hand(load(tmp_path), module.val_dataloader(), limit=1)
    whole = validate_by_hand(load(tmp_path), module.val_dataloader())

    assert callback.artifact.report["changed"]["num_samples"] == BATCH
    assert metrics["val_loss"] == pytest.approx(first["val_loss"], abs=1e-6)
    assert first["val_loss"] != pytest.approx(whole["val_loss"], abs=1e-5)
