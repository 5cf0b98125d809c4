import copy
import csv
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_models import (
    BATCH,
    NUM_CLASSES,
    Classifier,
    ConvNet,
    EnoughError,
    StopAfterTraining,
    WithoutValidation,
    decibels,
    equal_tensors,
    fit,
    images,
    make_trainer,
    seeded,
    tensors_of,
    validate_by_hand,
)
from torch import Tensor, nn

from lightning_quant import QuantizationAwareTraining, Schedule, load

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")

EPOCHS = 4
# Positions in training batches: 16 batches in all.
SCHEDULE = {"observe": 2, "fake_quantize": 4, "freeze_observers": 12, "freeze_batch_norm": 14, "unit": "steps"}


def ranges(callback: QuantizationAwareTraining) -> dict[str, tuple[float, float]]:
    """Return the observed range of every quantized tensor, from the state that checkpoints hold."""
    observers = callback.state_dict()["observers"]
    return {name: (float(state["low"]), float(state["high"])) for name, state in observers.items() if "low" in state}


class Watch(Callback):
    """Looks at the module and the ranges from outside while a fit runs."""

    def __init__(self, callback: QuantizationAwareTraining) -> None:
        self.callback = callback
        self.phases: list[str] = []
        self.rounded: list[bool] = []
        self.batch_norm_moves: list[bool] = []
        self.ranges: list[dict[str, Any]] = []
        self.around_validation: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.types: set[type] = set()
        self.keys: set[tuple[str, ...]] = set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.phases.append(pl_module.trainer.callbacks[0].prepared.phase)
        self.mean = pl_module.net.bn1.running_mean.clone()
        self.types.add(type(pl_module.net))
        self.keys.add(tuple(pl_module.state_dict()))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.batch_norm_moves.append(not torch.equal(self.mean, pl_module.net.bn1.running_mean))
        self.ranges.append(ranges(self.callback))
        self.rounded.append(not same_as_float(pl_module.net))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = ranges(self.callback)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.around_validation.append((self.before, ranges(self.callback)))


def same_as_float(net: nn.Module) -> bool:
    """Tell whether a call gives what the net's own forward gives, in eval mode and without a trace."""
    x = images(4, seed=9).tensors[0]
    training = net.training
    net.eval()
    with torch.no_grad():
        routed, own = net(x), type(net).forward(net, x)
    net.train(training)
    return torch.equal(routed, own)


class Trained:
    """One complete run that many tests look at."""

    def __init__(self, folder: Path) -> None:
        self.callback = QuantizationAwareTraining(output_dir=folder / "artifact", schedule=SCHEDULE)
        self.watch = Watch(self.callback)
        self.logger = CSVLogger(folder, name="logs", version=0)
        self.module = seeded()
        self.net = self.module.net
        self.weight = self.module.net.conv1.weight
        self.keys = list(self.module.state_dict())
        self.checkpoint = folder / "last.ckpt"
        self.trainer = fit(
            self.module,
            self.callback,
            self.watch,
            ModelCheckpoint(folder / "checkpoints", save_last=True),
            max_epochs=EPOCHS,
            logger=self.logger,
            enable_checkpointing=True,
            num_sanity_val_steps=2,
        )
        self.trainer.save_checkpoint(self.checkpoint)
        self.artifact = self.callback.artifact
        assert self.artifact is not None
        self.report = self.artifact.report
        self.metrics = {row["name"]: row for row in self.report["metrics"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    torch.manual_seed(0)
    return Trained(tmp_path_factory.mktemp("qat"))


# --- while fit runs


def test_phases_follow_the_schedule(trained: Trained) -> None:
    expected = ["off"] * 2 + ["observe"] * 2 + ["fake_quantize"] * 8 + ["frozen"] * 2 + ["frozen_batch_norm"] * 2

    assert trained.watch.phases == expected


def test_tensors_are_rounded_from_fake_quantization_on_and_not_before(trained: Trained) -> None:
    assert trained.watch.rounded == [False] * 4 + [True] * 12


def test_ranges_follow_the_data_until_they_are_frozen(trained: Trained) -> None:
    seen = trained.watch.ranges

    assert seen[0] == seen[1] == {}
    assert len(seen[2]) > 3
    assert all(before != after for before, after in itertools.pairwise(seen[2:12]))
    assert seen[11] == seen[12] == seen[13] == seen[14] == seen[15]


def test_batch_norm_statistics_follow_the_data_until_they_are_frozen(trained: Trained) -> None:
    assert trained.watch.batch_norm_moves == [True] * 14 + [False] * 2


def test_module_keeps_type_and_keys_throughout(trained: Trained) -> None:
    assert trained.watch.types == {ConvNet}
    assert trained.watch.keys == {tuple(trained.keys)}


def test_validation_does_not_move_the_ranges(trained: Trained) -> None:
    assert len(trained.watch.around_validation) == EPOCHS + 1
    assert all(before == after for before, after in trained.watch.around_validation)


def test_sanity_check_observes_nothing(trained: Trained) -> None:
    assert trained.watch.around_validation[0] == ({}, {})


class ObserveAlways(Callback):
    """Breaks the guard: lets ranges follow whatever runs."""

    def __init__(self, callback: QuantizationAwareTraining) -> None:
        self.callback = callback

    def on_validation_start(self, *_: Any) -> None:
        self.callback.prepared.observing = True


def test_validation_would_move_the_ranges_without_the_guard(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(
        output_dir=tmp_path, schedule={"observe": 0, **dict(list(SCHEDULE.items())[1:])}
    )
    watch = Watch(callback)
    with pytest.raises(EnoughError):
        fit(seeded(), callback, ObserveAlways(callback), watch, StopAfterTraining(), max_epochs=2)

    assert any(before != after for before, after in watch.around_validation)


# --- after fit


def test_module_is_the_float_model_again(trained: Trained) -> None:
    assert trained.module.net is trained.net
    assert type(trained.net) is ConvNet
    assert trained.net.conv1.weight is trained.weight
    assert list(trained.module.state_dict()) == trained.keys
    assert not any("forward" in module.__dict__ for module in trained.module.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trained.module.modules())
    assert same_as_float(trained.net)


def test_module_was_trained(trained: Trained) -> None:
    float_row = trained.metrics["val_accuracy"]

    assert not torch.equal(trained.weight, seeded().net.conv1.weight)
    assert float_row["float_value"] >= 0.75


def test_checkpoint_is_that_of_a_float_model(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lightning_quant")]:
        monkeypatch.setitem(sys.modules, name, None)
    restored = Classifier.load_from_checkpoint(trained.checkpoint, weights_only=True, strict=True)

    assert equal_tensors(tensors_of(restored), tensors_of(trained.module))


def test_trainer_goes_on_after_fit(trained: Trained) -> None:
    (values,) = make_trainer().validate(trained.module, verbose=False)

    assert values["val_accuracy"] == pytest.approx(trained.metrics["val_accuracy"]["float_value"])


def test_artifact_agrees_with_the_simulation(trained: Trained) -> None:
    x = images(32, seed=1).tensors[0]
    net = trained.net.eval()
    with torch.no_grad():
        own = net(x)
        with trained.callback.prepared.attached("frozen"):
            simulated = net(x)
        exported = load(trained.artifact.path)(x)

    assert exported.shape == (32, NUM_CLASSES)
    assert 15 < decibels(own, simulated) < 60
    assert decibels(simulated, exported) > decibels(own, simulated) + 10


def test_report_holds_the_users_metrics_of_the_file_itself(trained: Trained) -> None:
    by_hand = validate_by_hand(load(trained.artifact.path), trained.module.val_dataloader())

    for name, value in by_hand.items():
        assert trained.metrics[name]["artifact"] == pytest.approx(value, abs=1e-6)


def test_report_holds_the_users_metrics_of_the_float_model_and_the_simulation(trained: Trained) -> None:
    net = trained.net.eval()
    float_values = validate_by_hand(net, trained.module.val_dataloader())
    with trained.callback.prepared.attached("frozen"):
        simulated = validate_by_hand(net, trained.module.val_dataloader())

    assert float_values["val_loss"] != simulated["val_loss"]
    for name in float_values:
        assert trained.metrics[name]["float_value"] == pytest.approx(float_values[name], abs=1e-6)
        assert trained.metrics[name]["simulated"] == pytest.approx(simulated[name], abs=1e-6)


def test_report_knows_the_size_of_the_checkpoint(trained: Trained) -> None:
    path = trained.trainer.checkpoint_callback.best_model_path

    assert trained.report["checkpoint_bytes"] == Path(path).stat().st_size


def test_report_knows_the_time_of_every_stage(trained: Trained) -> None:
    assert set(trained.report["seconds"]) >= {"capture", "export", "evaluate"}
    assert all(value > 0 for value in trained.report["seconds"].values())


def test_loggers_get_the_numbers(trained: Trained) -> None:
    with (Path(trained.logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {name: float(value) for row in rows for name, value in row.items() if name.startswith("quant/") and value}

    assert logged == pytest.approx(trained.report["scalars"])
    assert logged["quant/artifact/val_accuracy"] == pytest.approx(trained.metrics["val_accuracy"]["artifact"])
    assert {"quant/size_ratio", "quant/delta/val_loss", f"quant/speedup/batch_{BATCH}"} <= set(logged)


def test_report_lies_in_the_folder(trained: Trained) -> None:
    assert json.loads((trained.artifact.path / "report.json").read_text()) == trained.report
    assert "val_accuracy" in trained.artifact.report_path.read_text()


def test_default_folder_is_beside_the_logs(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining()
    trainer = make_trainer(callback, logger=CSVLogger(tmp_path, name="runs", version=7))

    assert callback.folder(trainer) == tmp_path / "runs" / "version_7" / "quantized"


# --- what to evaluate


class Counting(Classifier):
    num_validations = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        type(self).num_validations += 1
        super().validation_step(batch, batch_idx)


def test_evaluation_can_be_switched_off_and_a_second_fit_replaces_the_artifact(tmp_path: Path) -> None:
    Counting.num_validations = 0
    callback = QuantizationAwareTraining(output_dir=tmp_path, evaluate=False)
    module = seeded(Counting)
    fit(module, callback)

    # Two batches of the run's own; at fit start one that shows how validation calls the module, and both to see whether
    # they decide as it does; and one that chose no range, to compare float and file on.
    assert Counting.num_validations == 6
    assert callback.artifact.report["metrics"] == []

    first = copy.deepcopy(callback.artifact.manifest)
    fit(module, callback)

    assert callback.artifact.manifest["sha256"] != first["sha256"]
    assert load(tmp_path)(images(2).tensors[0]).shape == (2, NUM_CLASSES)


def test_run_without_validation_and_without_checkpoints_says_so(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(output_dir=tmp_path, weights="best")
    fit(seeded(WithoutValidation), callback)
    notes = callback.artifact.report["notes"]

    assert callback.artifact.report["metrics"] == []
    assert any("no validation" in note for note in notes)
    assert any("last" in note and "ModelCheckpoint" in note for note in notes)
    assert "no validation" in callback.artifact.report_path.read_text()


# --- beside other features of Lightning


def test_run_that_stops_before_fake_quantization_says_so(tmp_path: Path) -> None:
    schedule = Schedule(0, 20, 30, 40, unit="epochs")
    callback = QuantizationAwareTraining(output_dir=tmp_path, schedule=schedule, evaluate=False)
    fit(seeded(), callback, EarlyStopping("score", mode="max", patience=0), max_epochs=50)

    assert any("before fake quantization" in note for note in callback.artifact.report["notes"])


# --- when things go wrong, and again


class Failing(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.fit_loop.epoch_loop.total_batch_idx == 2:
            raise RuntimeError("the user's own error")
        return super().training_step(batch, batch_idx)


def test_error_in_training_gives_the_forward_back(tmp_path: Path) -> None:
    module = seeded(Failing)
    with pytest.raises(RuntimeError, match="the user's own error"):
        fit(
            module,
            QuantizationAwareTraining(output_dir=tmp_path / "artifact", schedule=Schedule(0, 1, 4, 4, unit="steps")),
        )

    assert not any("forward" in child.__dict__ for child in module.modules())
    assert same_as_float(module.net)
    assert not (tmp_path / "artifact").exists()


class CallsItself(Classifier):
    """Quantizes the whole LightningModule: `training_step` calls `self`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))


def test_whole_lightning_module_is_quantized_when_training_step_calls_it(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(output_dir=tmp_path)
    module = seeded(CallsItself)
    fit(module, callback, max_epochs=2)
    (row,) = callback.artifact.report["metrics"]
    by_hand = validate_by_hand(load(tmp_path), module.val_dataloader())

    assert callback.artifact.plan["module"] == ""
    assert row["artifact"] == pytest.approx(by_hand["val_loss"], abs=1e-6)
    assert "forward" not in module.__dict__
