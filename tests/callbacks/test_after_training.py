"""What is measured of a trained module is in the artifact, and not in the user's module."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_models import equal_tensors, fit, seeded, tensors_of, validate_by_hand

import lightning_quant as lq
from lightning_quant.calibrate.distributed import Group
from lightning_quant.callbacks import after_training


@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
def test_statistics_measured_anew_are_in_the_artifact_and_not_in_the_users_module(tmp_path: Path) -> None:
    models = {}
    for number in (0, 4):
        folder = tmp_path / str(number)
        callback = lq.QuantizationAwareTraining({"batch_norm_batches": number}, output_dir=folder, threads=1)
        module = seeded()
        fit(module, callback, max_epochs=1, default_root_dir=tmp_path)
        models[number] = (tensors_of(module), lq.load(folder, threads=1))
    assert equal_tensors(models[0][0], models[4][0])
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(models[0][1](x), models[4][1](x))


@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
def test_an_artifact_with_other_statistics_is_compared_with_the_users_module(tmp_path: Path) -> None:
    callback = lq.QuantizationAwareTraining({"batch_norm_batches": 3}, output_dir=tmp_path / "a", threads=1)
    module = seeded()
    trainer = fit(module, callback, max_epochs=2, default_root_dir=tmp_path)
    (known,) = trainer.validate(module, verbose=False)
    assert callback.artifact is not None
    rows = {row["name"]: row for row in callback.artifact.report["metrics"]}
    assert rows["val_loss"]["float_value"] == pytest.approx(known["val_loss"], abs=1e-6)
    (note,) = [note for note in callback.artifact.report["notes"] if "measured anew" in note]
    assert "loss on others" in note
    assert "which are kept" not in note
    by_hand = validate_by_hand(lq.load(tmp_path / "a", threads=1), module.val_dataloader())
    assert rows["val_loss"]["artifact"] == pytest.approx(by_hand["val_loss"], abs=1e-5)


def test_processes_have_the_mean_of_their_statistics_and_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    original = after_training.write_buffers
    monkeypatch.setattr(after_training, "write_buffers", lambda root, new: (written.append(new), original(root, new)))
    # As if the others had answered so that the mean is 7.
    monkeypatch.setattr(Group, "mean", lambda self, tensor: torch.full_like(tensor, 7))
    callback = lq.QuantizationAwareTraining({"batch_norm_batches": 2}, output_dir=tmp_path, evaluate=False, threads=1)
    fit(seeded(), callback, max_epochs=1, default_root_dir=tmp_path)
    assert callback.artifact is not None
    (note,) = [note for note in callback.artifact.report["notes"] if "measured anew" in note]
    assert "loss on others 7, with those of training 7" in note
    assert all(bool((written[-1][name] == 7).all()) for name in written[-1])
    assert written[-1]["bn1.running_var"].shape == (4,)


@pytest.mark.parametrize(("worse", "number"), [(False, 2), (True, 16)])
def test_statistics_are_kept_where_the_loss_is_less(
    worse: bool, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(prepared: Any, steps: Any) -> int:
        def each() -> Any:
            for step in steps:
                yield step
                for name, buffer in prepared.root.named_buffers():
                    buffer.add_(100 * worse * name.endswith("running_mean"))

        return original(prepared, each())

    original = after_training.reestimate_batch_norm
    monkeypatch.setattr(after_training, "reestimate_batch_norm", spoiled)
    # Of 4 batches: 2 are left to judge by, or none but those that were measured on.
    recipe = {"batch_norm_batches": number}
    callback = lq.QuantizationAwareTraining(recipe, output_dir=tmp_path, evaluate=False, threads=1)
    fit(seeded(), callback, max_epochs=1, default_root_dir=tmp_path)
    assert callback.artifact is not None
    (note,) = [note for note in callback.artifact.report["notes"] if "measured anew" in note]
    assert ("which are kept" in note) == worse
