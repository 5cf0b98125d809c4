"""Scores while a fit validates: what the integers of the present weights get, in time for whatever watches them."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import Classifier, WithoutValidation, equal_tensors, images, make_trainer, seeded, tensors_of
from scored_runs import BOTH, DELTA, TWIN, Seen, make, trained, without_scores
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.callbacks.base import QuantizationCallback

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


@BOTH
def test_scores_are_those_of_the_artifact_and_the_run_is_the_same_without_them(
    kind: type[QuantizationCallback], tmp_path: Path
) -> None:
    weights, found, drawn = [], [], []
    for every in (None, 1):
        alike = {"calibration": {"num_batches": 1}} if kind is PostTrainingQuantization else {}
        module, callback, seen = seeded(), make(kind, tmp_path, score_every=every, **alike), Seen()
        make_trainer(EarlyStopping(TWIN if every else "val_loss"), seen, callback, max_epochs=2).fit(module)
        weights.append(tensors_of(module))
        drawn.append((torch.get_rng_state().tolist(), random.getstate()))
        found.append(seen.metrics)
        assert callback.artifact is not None
        metrics = callback.artifact.report["metrics"]
    assert equal_tensors(*weights)
    assert drawn[0] == drawn[1]
    assert [{n: v for n, v in one.items() if "twin" not in n} for one in found[1]] == found[0]
    for row in metrics:
        assert found[1][-1][f"quant/twin/{row['name']}"] == pytest.approx(row["artifact"], abs=1e-6)
        assert found[1][-1][f"quant/twin_delta/{row['name']}"] == pytest.approx(
            row["artifact"] - row["float_value"], abs=1e-6
        )
    assert found[1][0][DELTA] != 0


class Drops(Classifier):
    """Draws random numbers for its dropout and the order of its data."""

    def __init__(self) -> None:
        layers = nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)
        super().__init__(nn.Sequential(*layers))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(images(24, seed=1), 8, shuffle=True)


@BOTH
@pytest.mark.parametrize("batches", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_run_is_the_same_where_a_part_of_the_batches_is_scored(
    kind: type[QuantizationCallback], batches: int | None, tmp_path: Path
) -> None:
    runs, weights = [], []
    for every in (None, 1):
        module, only = seeded(Drops), {"score_batches": None if every is None else batches}
        metrics = trained(module, make(kind, tmp_path, score_every=every, **only), max_epochs=3)
        runs.append((without_scores(metrics), torch.get_rng_state().tolist(), random.getstate()))
        weights.append(tensors_of(module))
    assert all(DELTA in one for one in metrics)
    assert runs[0] == runs[1]
    assert equal_tensors(*weights)


@BOTH
@pytest.mark.parametrize("batches", [None, pytest.param(1.0, marks=pytest.mark.slow)])
def test_resumed_run_scores_as_an_uninterrupted_one(
    kind: type[QuantizationCallback], batches: float | None, tmp_path: Path
) -> None:
    points = {"fake_quantize": 1, "freeze_observers": 3, "unit": "epochs"}
    schedule = {"schedule": points} if kind is QuantizationAwareTraining else {}

    def run(epochs: int, **options: Any) -> list[dict[str, float]]:
        keep = ModelCheckpoint(tmp_path, f"last{epochs}", monitor=None)
        stop = EarlyStopping(TWIN, patience=9)
        return trained(
            seeded(),
            stop,
            keep,
            make(kind, tmp_path, score_every=2, score_batches=batches, **schedule),
            max_epochs=epochs,
            enable_checkpointing=True,
            **options,
        )

    whole = run(4)
    run(2)
    assert run(4, ckpt_path=tmp_path / "last2.ckpt") == whole[2:]


@BOTH
def test_every_nth_validation_is_scored(kind: type[QuantizationCallback], tmp_path: Path) -> None:
    callback = make(kind, tmp_path, score_every=2)
    values = [one[TWIN] for one in trained(seeded(), callback, max_epochs=4)]
    assert values[0] == values[1] != values[2] == values[3]


class Outgrown(Classifier):
    """Some units outgrow the others in the last epoch, and what reads them shrinks: the same in float alone."""

    def __init__(self) -> None:
        layers = nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)
        super().__init__(nn.Sequential(*layers), lr=0.01)

    def on_validation_epoch_start(self) -> None:
        if self.current_epoch == 2:
            with torch.no_grad():
                self.net[1].weight[:4] *= 1e4
                self.net[1].bias[:4] *= 1e4
                self.net[3].weight[:, :4] /= 1e4


@pytest.mark.parametrize(("monitor", "best"), [pytest.param("val_loss", 2, marks=pytest.mark.slow), (TWIN, 1)])
def test_best_checkpoint_is_that_of_the_best_integers(monitor: str, best: int, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor=monitor, save_on_train_epoch_end=False)
    callback = make(PostTrainingQuantization, tmp_path)
    trained(seeded(Outgrown), keep, callback, max_epochs=3, enable_checkpointing=True)
    assert Path(keep.best_model_path).name == f"epoch={best}.ckpt"


def test_averaged_weights_are_scored_where_they_are_validated(tmp_path: Path) -> None:
    plain = trained(seeded(), PostTrainingQuantization(output_dir=tmp_path, score_every=1))[0]
    averaged = trained(seeded(), WeightAveraging(), PostTrainingQuantization(output_dir=tmp_path, score_every=1))[0]
    assert averaged["val_loss"] != plain["val_loss"]
    assert abs(averaged[TWIN] - averaged["val_loss"]) < 0.05


def test_loggers_have_scores_beside_metrics(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trained(seeded(), make(PostTrainingQuantization, tmp_path), logger=logger)
    assert {TWIN, DELTA, "val_loss"} <= set(Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(","))


@pytest.mark.parametrize(
    ("module", "options", "monitor", "message"),
    [
        (WithoutValidation, {"score_every": 1}, "", "Expected a validation loop for `score_every`"),
        (Classifier, {}, TWIN, "Expected `score_every` for 'quant/twin/val_loss'"),
        (Classifier, {"score_batches": 2}, "", "Expected `score_every` for `score_batches`"),
        (Classifier, {"score_with": "runtime"}, "", "Expected `score_every` for `score_with`"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_training(
    module: type[LightningModule], options: dict[str, Any], monitor: str, message: str, tmp_path: Path
) -> None:
    callbacks = [EarlyStopping(monitor)] if monitor else []
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(*callbacks, PostTrainingQuantization(output_dir=tmp_path, **options)).fit(seeded(module))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_every": 0}, "Expected `score_every` to be a positive integer or None"),
        ({"score_every": 1, "score_with": "runtme"}, "Did you mean 'runtime'"),
        ({"score_every": 1, "score_batches": 0}, "Expected `score_batches` to be a number of batches from 1"),
    ],
)
@BOTH
def test_wrong_arguments_are_refused(kind: type[QuantizationCallback], options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        kind(**options)


def test_every_member_of_a_sweep_is_scored(tmp_path: Path) -> None:
    sweep = PostTrainingQuantization(["int8", "int8_dynamic"], "torch", output_dir=tmp_path, score_every=1)
    found = trained(seeded(), sweep)[0]
    names = [name for name in found if name.endswith("/twin_delta/val_loss")]
    assert len(names) == 2
    assert len({found[name] for name in names} - {0.0}) == 2


class FailsBesideTheRun(Classifier):
    """A validation that says no to any module but the run's own, in its second epoch, in one of its hooks."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook, self.own = hook, [id(self)]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.complain("validation_step")
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.complain("on_validation_epoch_end")

    def complain(self, hook: str) -> None:
        if hook == self.hook and id(self) not in self.own and self.trainer.current_epoch == 1:
            raise ZeroDivisionError("no copies")


@pytest.mark.parametrize("hook", ["validation_step", pytest.param("on_validation_epoch_end", marks=pytest.mark.slow)])
def test_validation_that_fails_beside_the_run_costs_the_score_alone(hook: str, tmp_path: Path) -> None:
    callback = make(QuantizationAwareTraining, tmp_path, score_every=1, schedule={"fake_quantize": 0.0})
    watching = EarlyStopping(TWIN, patience=1), ModelCheckpoint(tmp_path / "kept", monitor=TWIN, save_last=True)
    module, seen = FailsBesideTheRun(hook), Seen()
    with pytest.warns(match=r"not scored any more: .*no copies"):
        make_trainer(*watching, seen, callback, max_epochs=4, enable_checkpointing=True).fit(module)

    assert module.trainer.current_epoch == 4
    # Nothing of that is in checkpoints.
    assert (watching[0].state_dict()["patience"], watching[0].check_finite) == (1, True)
    scores = [metrics[TWIN] for metrics in seen.metrics]
    assert [math.isnan(score) for score in scores] == [False, True, True, True]
    assert callback.artifact is not None
    (missing,) = [w for w in callback.artifact.report["warnings"] if "scores while training" in w]
    assert "after 1 validations" in missing
    assert "no copies" in missing
