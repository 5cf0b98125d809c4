import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import (
    BATCH,
    NUM_CLASSES,
    NUM_TRAIN,
    Classifier,
    activation_scales,
    decibels,
    equal_tensors,
    fit,
    images,
    seeded,
    tensors_of,
    validate_by_hand,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, Recipe, load
from lightning_quant.callbacks.ptq import Calibration
from lightning_quant.recipe.recipe import IntegerSpec

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")

# Ranges that a test can compute by hand.
MIN_MAX = Recipe(name="min_max", calibration_observer="min_max")


class Growing(Classifier):
    """Every training batch is ten times larger than the one before; validation images are in between."""

    def __init__(self, *, shuffle: bool = False) -> None:
        super().__init__(lr=1e-6)
        self.shuffle = shuffle

    def train_dataloader(self) -> DataLoader:
        x, y = images(NUM_TRAIN, seed=1).tensors
        factors = 10.0 ** torch.arange(NUM_TRAIN // BATCH).repeat_interleave(BATCH)
        return DataLoader(TensorDataset(x * factors.view(-1, 1, 1, 1), y), BATCH, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader:
        x, y = images(BATCH, seed=2).tensors
        return DataLoader(TensorDataset(30 * x, y), BATCH)


class AtTrainEnd(Callback):
    """Keeps what training ended with."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tensors = tensors_of(pl_module)
        self.momentum = [state["momentum_buffer"].clone() for state in trainer.optimizers[0].state.values()]


def scale_of(x: Tensor) -> float:
    """Return the scale of a range by its definition: zero in it, 255 steps."""
    return float((x.max().clamp(min=0) - x.min().clamp(max=0)) / 255)


def first_activation(net: Any, x: Tensor) -> Tensor:
    """Return what the first fused operator of a `ConvNet` answers in eval mode."""
    with torch.no_grad():
        return F.relu(net.eval().bn1(net.conv1(x)))


def quantized(
    folder: Path, module: LightningModule, *callbacks: Callback, **arguments: Any
) -> PostTrainingQuantization:
    settings = {"recipe": MIN_MAX, "output_dir": folder, "evaluate": False} | arguments
    callback = PostTrainingQuantization(**settings)
    fit(module, callback, *callbacks)
    return callback


class Finished:
    """One complete run that several tests look at."""

    def __init__(self, folder: Path) -> None:
        self.module = seeded()
        self.at_train_end = AtTrainEnd()
        self.logger = CSVLogger(folder, name="logs", version=0)
        self.callback = PostTrainingQuantization(
            MIN_MAX, output_dir=folder / "artifact", calibration={"num_batches": 2, "seed": 3}
        )
        self.before = seeded()
        self.trainer = fit(self.module, self.callback, self.at_train_end, max_epochs=3, logger=self.logger)
        self.artifact = self.callback.artifact
        self.scales = activation_scales(self.artifact.model_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    torch.manual_seed(0)
    return Finished(tmp_path_factory.mktemp("ptq"))


def test_module_is_untouched_bit_for_bit(finished: Finished) -> None:
    assert equal_tensors(tensors_of(finished.module), finished.at_train_end.tensors)
    assert not any("forward" in module.__dict__ for module in finished.module.modules())
    assert all(parameter.requires_grad for parameter in finished.module.parameters())
    now = [state["momentum_buffer"] for state in finished.trainer.optimizers[0].state.values()]
    assert all(torch.equal(a, b) for a, b in zip(now, finished.at_train_end.momentum, strict=True))


def test_ranges_come_from_the_trained_weights(finished: Finished) -> None:
    x = images(NUM_TRAIN, seed=1).tensors[0][: 2 * BATCH]
    trained, untrained = (scale_of(first_activation(module.net, x)) for module in (finished.module, finished.before))

    assert finished.scales[0] == pytest.approx(scale_of(x), rel=1e-6)
    assert finished.scales[1] == pytest.approx(trained, rel=1e-5)
    assert finished.scales[1] != pytest.approx(untrained, rel=1e-2)


def test_report_holds_the_users_metrics_of_the_file_itself(finished: Finished) -> None:
    by_hand = validate_by_hand(load(finished.artifact.path), finished.module.val_dataloader())
    float_values = validate_by_hand(finished.module.net.eval(), finished.module.val_dataloader())
    metrics = {row["name"]: row for row in finished.artifact.report["metrics"]}

    for name, value in by_hand.items():
        assert metrics[name]["artifact"] == pytest.approx(value, abs=1e-6)
        assert metrics[name]["float_value"] == pytest.approx(float_values[name], abs=1e-6)


def test_loggers_and_report_get_the_numbers(finished: Finished) -> None:
    logged = (Path(finished.logger.log_dir) / "metrics.csv").read_text()

    assert "quant/artifact/val_accuracy" in logged
    assert {"capture", "calibrate", "export", "evaluate"} <= set(finished.artifact.report["seconds"])
    assert finished.artifact.report_path.is_file()


def test_artifact_is_close_to_the_float_model(finished: Finished) -> None:
    x = images(BATCH, seed=1).tensors[0]
    with torch.no_grad():
        assert decibels(finished.module.net.eval()(x), load(finished.artifact.path)(x)) > 25


# --- calibration data


COARSE = Recipe(name="coarse", weight=IntegerSpec(bits=3, symmetric=True, per_channel=True), bias_correction=False)


def test_report_says_which_operator_costs_what(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"recipe": COARSE, "evaluate": True, "calibration": {"num_batches": 2, "seed": 3}}
    report = quantized(tmp_path / "all", seeded(), sensitivity=True, **settings).artifact.report
    found = report["sensitivity"]
    worst = found["layers"][0]["name"]
    recipe = replace(COARSE, overrides={worst: "float"})
    spared = quantized(tmp_path / "spared", seeded(), **settings | {"recipe": recipe}).artifact.report
    loss, without = (
        next(row["simulated"] for row in each["metrics"] if row["name"] == "val_loss") for each in (report, spared)
    )

    assert {layer["name"] for layer in found["layers"]} == {"conv1", "conv2", "head", "add"}
    assert found["layers"] == sorted(found["layers"], key=lambda layer: layer["without_error"])
    assert abs(without - loss) > 0.01
    assert found["gains"]["val_loss"] == pytest.approx(without - loss, rel=0.1)
    path = tmp_path / "all" / "report.md"
    line = next(line for line in path.read_text().splitlines() if "of the error comes from" in line)
    assert f"from {worst}, weights" in line
    assert f"val_loss {found['gains']['val_loss']:+.4f}" in line
    assert spared["sensitivity"] is None


def test_sensitivity_of_recipes_of_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"calibrated for `sensitivity`, .* but got 'int8_weight_only'"):
        PostTrainingQuantization("int8_weight_only", output_dir=tmp_path, sensitivity=True)


def test_number_of_batches(tmp_path: Path) -> None:
    module = seeded(Growing)
    callback = quantized(tmp_path, module, calibration={"num_batches": 2})
    seen = module.train_dataloader().dataset.tensors[0][: 2 * BATCH]

    assert activation_scales(callback.artifact.model_path)[0] == pytest.approx(scale_of(seen), rel=1e-6)


def test_validation_data_is_read_only_when_it_is_named(tmp_path: Path) -> None:
    module = seeded(Growing)
    callback = quantized(tmp_path, module, calibration=Calibration(num_batches=1, data="validation"))
    validation = module.val_dataloader().dataset.tensors[0]

    # The training batch of the same number has a thirtieth of this range; see the test of the number of batches.
    assert activation_scales(callback.artifact.model_path)[0] == pytest.approx(scale_of(validation), rel=1e-6)


class Still(Growing):
    """Shuffles, and trains nothing: only calibration tells two runs apart."""

    def __init__(self) -> None:
        super().__init__(shuffle=True)
        self.lr = 0.0
        for norm in (self.net.bn1, self.net.bn2):
            norm.momentum = 0.0


def test_seed_decides_what_is_seen(tmp_path: Path) -> None:
    files = []
    for index, seed in enumerate((5, 5, 6)):
        module = seeded(Still)
        # Whatever was drawn before must not count.
        torch.rand(index)
        callback = quantized(tmp_path / str(index), module, calibration={"num_batches": 1, "seed": seed})
        files.append(callback.artifact.model_path.read_bytes())

    assert files[0] == files[1]
    assert files[0] != files[2]


def test_dropout_is_off_while_calibrating(tmp_path: Path) -> None:
    class Dropping(Growing):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 4))

    module = seeded(Dropping)
    callback = quantized(tmp_path, module, calibration={"num_batches": 1})
    seen = module.train_dataloader().dataset.tensors[0][:BATCH]

    # Dropout in training mode would double what it keeps.
    assert max(activation_scales(callback.artifact.model_path)) == pytest.approx(scale_of(seen), rel=1e-6)


@pytest.mark.parametrize("given", [{"num_batches": 0}, {"data": "test"}])
def test_calibration_is_checked_when_the_callback_is_made(given: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=next(iter(given))):
        PostTrainingQuantization(calibration=given)


# --- which weights


def test_best_weights_are_calibrated_and_exported(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="score", mode="max")
    callback = PostTrainingQuantization(MIN_MAX, output_dir=tmp_path / "artifact", weights="best", evaluate=False)
    module = seeded(best_epoch=1)
    fit(module, callback, checkpoint, max_epochs=4, enable_checkpointing=True)
    best = Classifier.load_from_checkpoint(checkpoint.best_model_path)
    x = images(NUM_TRAIN, seed=1).tensors[0]
    scales = activation_scales(callback.artifact.model_path)

    assert scales[1] == pytest.approx(scale_of(first_activation(best.net, x)), rel=1e-5)
    assert scales[1] != pytest.approx(scale_of(first_activation(module.net, x)), rel=1e-2)
    assert any("best" in note and "epoch=1" in note for note in callback.artifact.report["notes"])


# --- evaluation


class BesideForward(Growing):
    """Calls the net, and a layer of it once more for an auxiliary metric."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("feature_norm", self.net.features(batch[0]).norm())


def test_validation_that_bypasses_the_artifact_is_detected(tmp_path: Path) -> None:
    report = quantized(tmp_path, BesideForward(), evaluate=True).artifact.report
    (lacking,) = [text for text in report["warnings"] if "missing" in text]

    assert re.search(r"metrics of the artifact.*'conv1'.*ran in float beside it.*evaluate=False", lacking)
    assert {row["artifact"] for row in report["metrics"]} == {None}
    # What took hours to train is not lost.
    assert load(tmp_path)(images(2).tensors[0]).shape == (2, NUM_CLASSES)


def test_validation_that_bypasses_the_artifact_passes_without_evaluation(tmp_path: Path) -> None:
    module = BesideForward()
    callback = quantized(tmp_path, module)
    seen = module.train_dataloader().dataset.tensors[0]

    assert callback.artifact.report["metrics"] == []
    # There are fewer batches than the default number of them, and all count.
    assert Calibration().num_batches == 32
    assert activation_scales(callback.artifact.model_path)[0] == pytest.approx(scale_of(seen), rel=1e-6)


# --- beside quantization-aware training


def test_both_callbacks_in_one_trainer(tmp_path: Path) -> None:
    schedule = {"observe": 0, "fake_quantize": 1, "freeze_observers": 3, "unit": "steps"}
    trained = QuantizationAwareTraining(output_dir=tmp_path / "qat", schedule=schedule, evaluate=False)
    calibrated = PostTrainingQuantization(MIN_MAX, output_dir=tmp_path / "ptq", evaluate=False)
    module = seeded()
    fit(module, calibrated, trained)
    x = images(BATCH, seed=1).tensors[0]
    with torch.no_grad():
        expected = module.net.eval()(x)

    assert decibels(expected, load(tmp_path / "qat")(x)) > 15
    assert decibels(expected, load(tmp_path / "ptq")(x)) > 25
    assert "forward" not in module.net.__dict__


@pytest.mark.parametrize(("batch", "num_batches"), [(NUM_TRAIN, 32), (BATCH, 1)])
def test_accuracy_steps_on_one_batch_are_refused_before_training(batch: int, num_batches: int, tmp_path: Path) -> None:
    model = seeded()
    model.train_dataloader = lambda: DataLoader(images(NUM_TRAIN, seed=1), batch)
    before = tensors_of(model)
    callback = PostTrainingQuantization(
        "int8_accurate", output_dir=tmp_path / "artifact", calibration={"num_batches": num_batches}
    )
    with pytest.raises(MisconfigurationException, match=r"at least 2 calibration batches .* but got 1"):
        fit(model, callback, max_epochs=1)
    assert equal_tensors(tensors_of(model), before)
