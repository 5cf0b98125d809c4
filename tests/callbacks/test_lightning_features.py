"""Flags of the Trainer, kinds of batches, ways of optimizing, precisions: training as users really run it."""

import copy
import dataclasses
import itertools
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from features import feature
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning_models import (
    BATCH,
    NUM_TRAIN,
    NUM_VALIDATION,
    Classifier,
    Recorder,
    WithoutValidation,
    decibels,
    fit,
    images,
    seeded,
    validate_by_hand,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_quant import QuantizationAwareTraining, load

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]


def arguments_of(kind: Any, **schedule: Any) -> dict[str, Any]:
    return {"schedule": schedule} if schedule and kind is QuantizationAwareTraining else {}


def check(callback: Any, module: Any) -> None:
    """Check the artifact against the module that was trained, and that nothing is left on that module."""
    assert not any("forward" in child.__dict__ for child in module.modules())
    assert list(module.state_dict()) == list(type(module)().state_dict())
    assert callback.artifact.report["parity"]["worst_share"] >= 0.999
    assert callback.artifact.plan["coverage"] == 1.0
    x = images(BATCH, seed=1).tensors[0]
    with torch.no_grad():
        expected = copy.deepcopy(module.net).float().eval()(x)
    assert decibels(expected, load(callback.artifact.path)(x)) > 15


# --- the Trainer


class Manual(Classifier):
    """Optimizes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(*images(NUM_TRAIN, seed=1).tensors, strict=True)


class Streamed(Classifier):
    """Its loader has no length."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(), BATCH)


class OneLeft(Classifier):
    """The last batch of an epoch has one sample, on which it trains in eval mode."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.net.train(len(batch[0]) > 1)
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(images(NUM_TRAIN + 1, seed=1), BATCH)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(images(NUM_VALIDATION + 1, seed=2), BATCH)


STEPS = {"fake_quantize": 1, "freeze_observers": 3, "unit": "steps"}
BY_EPOCH = {"fake_quantize": 1, "freeze_observers": 2, "unit": "epochs"}


def flag(name: str, options: dict[str, Any], batches: int, module: Any = Classifier, **schedule: Any) -> Any:
    marks = feature("Trainer", name)
    return pytest.param(options, batches, module, schedule or STEPS, id=name.replace(" ", "-"), marks=marks)


@pytest.mark.parametrize(
    ("options", "batches", "make", "schedule"),
    [
        flag("accumulate_grad_batches", {"accumulate_grad_batches": 2}, 8),
        flag("gradient_clip_val by norm", {"gradient_clip_val": 0.5}, 8),
        flag(
            "gradient_clip_val by value", {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, 8, Classifier
        ),
        flag("manual optimization", {}, 8, Manual),
        flag("limit_train_batches and limit_val_batches", {"limit_train_batches": 0.5, "limit_val_batches": 1}, 4),
        flag("overfit_batches", {"overfit_batches": 1}, 2, **(STEPS | {"freeze_observers": 2})),
        flag("max_steps", {"max_steps": 5, "max_epochs": -1}, 5),
        flag("val_check_interval", {"val_check_interval": 2}, 8),
        flag("check_val_every_n_epoch", {"check_val_every_n_epoch": 2}, 8),
        flag("reload_dataloaders_every_n_epochs", {"reload_dataloaders_every_n_epochs": 1}, 8),
        flag("detect_anomaly", {"detect_anomaly": True}, 8),
        flag("deterministic", {"deterministic": True}, 8),
        flag("inference_mode=False", {"inference_mode": False}, 8),
        flag("IterableDataset without length", {}, 8, Streamed),
        flag("a last batch of one sample", {}, 10, OneLeft),
    ],
)
def test_flags(
    kind: Any, options: dict[str, Any], batches: int, make: Any, schedule: dict[str, Any], tmp_path: Path
) -> None:
    callback, recorder = kind(output_dir=tmp_path, **arguments_of(kind, **schedule)), Recorder()
    module = seeded(make)
    fit(module, callback, recorder, **({"max_epochs": 2} | options))

    assert recorder.num_batches == batches
    assert callback.artifact.report["metrics"]
    check(callback, module)


@feature("Trainer", "fast_dev_run")
def test_fast_dev_run_tries_everything(kind: Any, tmp_path: Path) -> None:
    callback = kind(output_dir=tmp_path)
    module = seeded()
    fit(module, callback, fast_dev_run=True)

    assert callback.artifact.report["metrics"]
    assert callback.artifact.report["notes"] == []
    check(callback, module)


@feature("Trainer", "max_time")
def test_max_time(kind: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A tick for each look at the clock, of which there is one a batch, however busy the machine is.
    ticks = itertools.count(step=0.05)
    clock = types.SimpleNamespace(monotonic=lambda: next(ticks))
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", clock)
    callback = kind(output_dir=tmp_path, evaluate=False, **arguments_of(kind, **BY_EPOCH))
    module = seeded()
    trainer = fit(module, callback, max_epochs=-1, max_time={"seconds": 1})

    assert trainer.current_epoch > 2
    check(callback, module)


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        pytest.param(
            WithoutValidation, {}, "has no validation loop", marks=feature("Trainer", "no validation loop at all")
        ),
        pytest.param(
            Classifier,
            {"limit_val_batches": 0},
            "has switched validation off",
            marks=feature("Trainer", "limit_val_batches=0"),
        ),
    ],
)
def test_runs_without_metrics_say_why(
    kind: Any, make: Any, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    callback = kind(output_dir=tmp_path)
    fit(seeded(make), callback, **options)

    assert [note for note in callback.artifact.report["notes"] if "no validation metrics" in note] == [
        f"no validation metrics: the run {reason}"
    ]


class Silent(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


@feature("Trainer", "a validation_step that logs nothing")
def test_validation_that_logs_nothing_says_so(kind: Any, tmp_path: Path) -> None:
    callback = kind(output_dir=tmp_path)
    fit(seeded(Silent), callback)

    assert "no validation metrics: the validation loop logs none" in callback.artifact.report["notes"]


@feature("Trainer", "no logger")
def test_no_logger(kind: Any, tmp_path: Path) -> None:
    callback = kind(output_dir=tmp_path / "artifact")
    trainer = fit(seeded(), callback, logger=False, default_root_dir=tmp_path)

    assert trainer.loggers == []
    assert callback.artifact.report["metrics"]


@feature("Trainer", "several loggers")
def test_every_logger_gets_the_numbers(kind: Any, tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name=name, version=0) for name in ("one", "two")]
    fit(seeded(), kind(output_dir=tmp_path / "artifact"), logger=loggers)
    first, second = ((Path(logger.log_dir) / "metrics.csv").read_text() for logger in loggers)

    assert "quant/artifact/val_accuracy" in first
    assert first == second


@pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)` but:UserWarning")
@feature("Trainer", "barebones=True")
def test_barebones(kind: Any, tmp_path: Path) -> None:
    callback = kind(output_dir=tmp_path)
    module = seeded()
    Trainer(barebones=True, max_epochs=2, callbacks=[callback], accelerator="cpu").fit(module)

    check(callback, module)


class ByEpoch(Classifier):
    """What its validation answers depends on when it is asked."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])
        self.log("epoch", float(self.current_epoch))
        self.log("step", float(self.global_step))


@feature("Trainer", "a validation_step that depends on current_epoch and global_step")
def test_evaluation_knows_the_epoch(kind: Any, tmp_path: Path) -> None:
    callback = kind(output_dir=tmp_path)
    trainer = fit(seeded(ByEpoch), callback, max_epochs=3)
    metrics = {row["name"]: row for row in callback.artifact.report["metrics"]}

    assert metrics["epoch"]["artifact"] == metrics["epoch"]["float_value"] == 2
    assert metrics["step"]["artifact"] == float(trainer.global_step)
    assert float(trainer.callback_metrics["epoch"]) == 2


# --- batches


@dataclasses.dataclass
class Sample:
    image: Tensor
    label: Tensor


def batched(make: Callable[[Tensor, Tensor], Any], read: Callable[[Any], Any]) -> type[LightningModule]:
    def collate(samples: list[Any]) -> Any:
        return make(torch.stack([image for image, _ in samples]), torch.stack([label for _, label in samples]))

    class Structured(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(read(batch), batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(read(batch), batch_idx)

        def train_dataloader(self) -> DataLoader:
            return DataLoader(images(NUM_TRAIN, seed=1), BATCH, collate_fn=collate)

        def val_dataloader(self) -> DataLoader:
            return DataLoader(images(NUM_VALIDATION, seed=2), BATCH, collate_fn=collate)

    return Structured


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            batched(lambda x, y: {"image": x, "label": y}, lambda b: (b["image"], b["label"])),
            marks=feature("Batches", "dicts"),
            id="dict",
        ),
        pytest.param(
            batched(lambda x, y: (x, y), lambda b: b),
            marks=feature("Batches", "tuples"),
            id="tuple",
        ),
        pytest.param(
            batched(Sample, lambda b: (b.image, b.label)), marks=feature("Batches", "dataclasses"), id="dataclass"
        ),
        pytest.param(
            batched(lambda x, y: [{"in": (x, {"again": x})}, [y]], lambda b: (b[0]["in"][1]["again"], b[1][0])),
            marks=feature("Batches", "nested lists, tuples and dicts"),
            id="nested",
        ),
    ],
)
def test_structures_of_batches(kind: Any, make: type[LightningModule], tmp_path: Path) -> None:
    callback = kind(output_dir=tmp_path)
    module = seeded(make)
    fit(module, callback, max_epochs=2)
    by_hand = validate_by_hand(load(tmp_path), Classifier().val_dataloader())
    metrics = {row["name"]: row["artifact"] for row in callback.artifact.report["metrics"]}

    assert metrics["val_loss"] == pytest.approx(by_hand["val_loss"], abs=1e-6)
    check(callback, module)


# --- several optimizers


class GAN(LightningModule):
    """Two networks with an optimizer each; the first is the one that gets deployed."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 16), nn.LeakyReLU(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0].flatten(1)
        noise = torch.randn(len(real), 8, device=self.device)
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        self._step(first, F.softplus(-self.discriminator(self.generator(noise))).mean())
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        fake = F.softplus(self.discriminator(self.generator(noise).detach())).mean()
        self._step(second, fake + F.softplus(-self.discriminator(real)).mean())
        self.untoggle_optimizer(second)

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        noise = torch.randn(len(batch[0]), 8, generator=torch.Generator().manual_seed(0))
        self.log("realism", self.discriminator(self.generator(noise)).mean())

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), 0.01) for net in (self.generator, self.discriminator)]

    train_dataloader = Classifier.train_dataloader
    val_dataloader = Classifier.val_dataloader


@feature("Optimizers", 'several optimizers: a GAN with module="generator"')
def test_generator_of_a_gan(kind: Any, tmp_path: Path) -> None:
    callback = kind(module="generator", output_dir=tmp_path)
    module = seeded(GAN)
    before = module.discriminator[0].weight.clone()
    fit(module, callback, max_epochs=2)
    noise = torch.randn(16, 8)
    (row,) = callback.artifact.report["metrics"]

    with torch.no_grad():
        assert decibels(module.generator(noise), load(tmp_path)(noise)) > 20
    assert row["artifact"] == pytest.approx(row["float_value"], abs=0.05)
    assert row["artifact"] != row["float_value"]
    assert not torch.equal(module.discriminator[0].weight, before)


# --- precision


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(name, marks=feature("Precision", name))
        for name in ("32-true", "bf16-mixed", "bf16-true", "16-true", "64-true")
    ],
)
def test_precisions(kind: Any, precision: Any, tmp_path: Path) -> None:
    callback = kind(output_dir=tmp_path)
    module = seeded()
    trainer = fit(module, callback, max_epochs=4, precision=precision)
    dtypes = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    metrics = {row["name"]: row for row in callback.artifact.report["metrics"]}
    (by_hand,) = [validate_by_hand(load(tmp_path), module.val_dataloader())]

    # Lightning replaces a precision that a device does not have by another, and says so quietly.
    assert str(trainer.precision) == precision
    assert module.net.head.weight.dtype == dtypes.get(precision, torch.float32)
    assert metrics["val_accuracy"]["float_value"] >= 0.9
    assert metrics["val_accuracy"]["artifact"] == pytest.approx(by_hand["val_accuracy"])
    assert metrics["val_accuracy"]["artifact"] == pytest.approx(metrics["val_accuracy"]["float_value"], abs=0.07)
    assert not callback.artifact.report["missing"]
    check(callback, module)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: on the CPU 16-mixed is bf16-mixed in disguise")
@feature("Precision", "16-mixed", needs="a GPU")
def test_mixed_half_precision_on_a_gpu(kind: Any, tmp_path: Path) -> None:
    callback = kind(output_dir=tmp_path)
    module = seeded()
    trainer = fit(module, callback, max_epochs=4, precision="16-mixed", accelerator="gpu", devices=1)

    assert str(trainer.precision) == "16-mixed"
    check(callback, module)
