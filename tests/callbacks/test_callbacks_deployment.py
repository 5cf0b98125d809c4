from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import Classifier, fit, seeded
from scored_runs import TWIN, Seen, make

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.callbacks import ptq
from lightning_quant.callbacks.deployment import Deployment

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


@pytest.mark.parametrize(("weights", "note"), [("last", ""), ("best", "weights are the best ones, from ")])
def test_the_weights_to_export_are_a_copy_of_the_last_or_the_best(
    weights: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Deployment] = []
    monkeypatch.setattr(ptq, "finish", lambda callback, trainer, deployment: seen.append(deployment))
    saving = ModelCheckpoint(tmp_path / "saved", monitor="score", mode="max", save_last=True)
    model: Any = Classifier(best_epoch=0)
    fit(
        model,
        saving,
        PostTrainingQuantization(output_dir=tmp_path / "q", weights=weights),
        max_epochs=2,
        enable_checkpointing=True,
    )
    (deployment,) = seen
    assert "".join(deployment.notes).startswith(note)
    same = torch.equal(deployment.pl_module.net.conv1.weight, model.net.conv1.weight)  # type: ignore[union-attr]
    assert same == (weights == "last")
    assert deployment.pl_module is not model
    assert deployment.checkpoint == Path(saving.best_model_path)
    assert SimpleNamespace(**vars(deployment)).known is None


class Truncates(Callback):
    """Leaves half of the best checkpoint, as a full disk does."""

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        path = Path(trainer.checkpoint_callback.best_model_path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_best_checkpoint_that_cannot_be_read_costs_no_artifact(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", monitor="score", mode="max")
    callback = PostTrainingQuantization(output_dir=tmp_path / "q", weights="best", evaluate=False)
    fit(Classifier(best_epoch=0), Truncates(), saving, callback, max_epochs=2, enable_checkpointing=True)
    (note,) = [note for note in callback.artifact.report["notes"] if note.startswith("weights")]  # type: ignore[union-attr]
    assert note.startswith("weights are the last ones: the best checkpoint epoch=0-step=")
    assert "cannot be read" in note


class Partial(Classifier):
    """Keeps its first layer out of its checkpoints."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["net.conv1.weight"]


@pytest.mark.parametrize("strict", [True, False])
def test_a_best_checkpoint_without_all_weights_costs_no_artifact(strict: bool, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", monitor="score", mode="max")
    callback = PostTrainingQuantization("float16", "torch", output_dir=tmp_path / "q", weights="best", evaluate=False)
    module = Partial(best_epoch=0)
    module.strict_loading = strict
    fit(module, saving, callback, max_epochs=2, enable_checkpointing=True)
    (note,) = [note for note in callback.artifact.report["notes"] if note.startswith("weights")]  # type: ignore[union-attr]

    if strict:
        assert note.startswith("weights are the last ones")
        assert "has other weights: net.conv1.weight" in note
    else:
        assert note.startswith("weights are the best ones")


@pytest.mark.parametrize(
    ("monitor", "epoch", "note"),
    [
        pytest.param("score", 1, "weights are the last ones: the best checkpoint epoch=0", marks=pytest.mark.slow),
        ("quant/twin/score", 0, "weights are the best ones, from epoch=0"),
    ],
)
def test_a_best_checkpoint_of_more_bits_is_exported_where_it_was_scored_in_the_recipes(
    monitor: str, epoch: int, note: str, tmp_path: Path
) -> None:
    points = {"fake_quantize": 0, "anneal_bits_until": 1, "freeze_observers": 2, "unit": "epochs"}
    recipe = {"name": "int4", "batch_norm_batches": 0}
    options = {"recipe": recipe, "schedule": points, "weights": "best", "threads": 1}
    callback, seen = make(QuantizationAwareTraining, tmp_path, **options), Seen()
    saving = ModelCheckpoint(tmp_path / "saved", monitor=monitor, mode="max", save_on_train_epoch_end=False)
    fit(seeded(best_epoch=0), seen, callback, saving, max_epochs=2, enable_checkpointing=True)
    (said,) = [note for note in callback.artifact.report["notes"] if note.startswith("weights are")]
    assert said.startswith(note)
    assert said.endswith("was saved before the recipe's bits were reached")
    row = next(row for row in callback.artifact.report["metrics"] if row["name"] == "val_loss")
    assert seen.metrics[epoch][TWIN] == pytest.approx(row["artifact"], abs=1e-6)
    # The training itself had more bits then.
    assert (seen.metrics[epoch]["val_loss"] == seen.metrics[epoch][TWIN]) == (epoch == 1)
