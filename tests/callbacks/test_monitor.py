"""QuantizationMonitor names the layer that goes bad in the epoch in which it does, and leaves the run as it is."""

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import (
    Classifier,
    EnoughError,
    StopAfterTraining,
    equal_tensors,
    fit,
    make_trainer,
    seeded,
    tensors_of,
)
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, QuantizationMonitor
from lightning_quant.errors import NoEffectWarning


class Mlp(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)), lr=1e-3)


class Planting(Callback):
    """Lets a unit outgrow the others in an epoch."""

    def __init__(self, epoch: int, unit: int) -> None:
        self.epoch, self.unit = epoch, unit

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            with torch.no_grad():
                pl_module.net[1].weight[self.unit].abs_().mul_(1e3)
                pl_module.net[3].weight[:, self.unit] /= 1e3


def test_planted_outlier_is_named_in_its_epoch_with_the_ways_out() -> None:
    monitor = QuantizationMonitor()
    with pytest.warns(NoEffectWarning) as warned:
        fit(seeded(Mlp), Planting(2, 7), monitor, max_epochs=4)
    texts = [str(one.message) for one in warned if "QuantizationMonitor" in str(one.message)]
    assert all("went bad in epoch 2" in text for text in texts)
    (text,) = (text for text in texts if "'net.3' went bad in epoch 2: channel 7 of what it reads" in text)
    assert "regularize" in text
    assert "exclude=['net.3']" in text


class Normalized(Classifier):
    """Has weights that change, or draw, with every look at them in training."""

    def __init__(self) -> None:
        last = nn.Linear(16, 4)
        parametrize.register_parametrization(last, "weight", nn.Dropout(0.1))
        first = spectral_norm(nn.Linear(64, 16))
        super().__init__(nn.Sequential(nn.Flatten(), first, nn.ReLU(), last))


@pytest.mark.filterwarnings("error::lightning_quant.errors.NoEffectWarning")
@pytest.mark.parametrize(("kind", "aware"), [(Classifier, False), (Classifier, True), (Normalized, False)])
def test_run_is_the_same_with_it(kind: type[Classifier], aware: bool, tmp_path: Path) -> None:
    ended = []
    for watching in ([], [QuantizationMonitor(2)]):
        module = seeded(kind)
        ours: list[Any] = [QuantizationAwareTraining(output_dir=tmp_path)] if aware else []
        with pytest.raises(EnoughError):
            make_trainer(*ours, *watching, StopAfterTraining(), max_epochs=2).fit(module)
        ended.append((tensors_of(module), torch.get_rng_state()))
    assert equal_tensors(ended[0][0], ended[1][0])
    assert torch.equal(ended[0][1], ended[1][1])


def test_scalars_are_logged_and_the_worst_are_metrics(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = fit(seeded(), QuantizationMonitor(2), logger=logger)
    header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(",")
    for key in ("input_db", "weight_db", "input_spread", "weight_spread", "kurtosis", "clipped", "drift", "flips"):
        assert f"quant/monitor/net.conv2/{key}" in header
    assert 20 < trainer.callback_metrics["quant/worst_db"] < 60
    assert trainer.callback_metrics["quant/worst_spread"] >= 1
    assert trainer.callback_metrics["quant/worst_flips"] > 0


def test_looks_are_rare() -> None:
    class Counting(QuantizationMonitor):
        counted = 0

        def _weight(self, layer: Any) -> Any:
            self.counted += 1
            return super()._weight(layer)

    monitor = Counting(8)
    fit(seeded(Mlp), monitor, max_epochs=4)
    # Of 16 batches the first, the ninth, and the last of each other epoch; and once more at the end of every epoch.
    assert monitor.counted == 2 * (2 + 2 + 4)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_flips_are_those_of_a_batch_that_moves_weights(accumulate: int, tmp_path: Path) -> None:
    class ByHand(Callback):
        """Rounds a weight before and after each step of the optimizer."""

        def __init__(self) -> None:
            self.integers, self.flips = torch.empty(0), list[float]()

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.integers = self.rounded(pl_module.net[3].weight.detach())

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            changed = self.integers != self.rounded(pl_module.net[3].weight.detach())
            self.flips.append(changed.float().mean().item())

        @staticmethod
        def rounded(weight: torch.Tensor) -> torch.Tensor:
            return (weight / (weight.abs().amax(1, keepdim=True) / 127)).round()

    # 4 batches in each epoch: looks at the first batch, or at the last, which is the one that moves weights.
    logger, by_hand = CSVLogger(tmp_path), ByHand()
    options = {"max_epochs": 2, "logger": logger, "accumulate_grad_batches": accumulate}
    fit(seeded(Mlp), QuantizationMonitor(4), by_hand, **options)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        logged = [row["quant/monitor/net.3/flips"] for row in csv.DictReader(file)]
    flips = [float(value) for value in logged if value]
    assert flips == pytest.approx(by_hand.flips[accumulate - 1 :: 4])
    assert min(flips) > 0


def test_a_resumed_run_knows_ranges_and_what_has_gone_bad(tmp_path: Path) -> None:
    """A layer goes bad once, however often its run was interrupted."""
    first, saving = QuantizationMonitor(alarm_db=100), ModelCheckpoint(tmp_path)
    with pytest.warns(NoEffectWarning, match="went bad in epoch 0"):
        fit(seeded(Mlp), first, saving, enable_checkpointing=True, max_epochs=1)
    second = QuantizationMonitor(alarm_db=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        resumed = make_trainer(second, ModelCheckpoint(tmp_path), enable_checkpointing=True, max_epochs=2)
        resumed.fit(seeded(Mlp), ckpt_path=saving.best_model_path)
    assert second.bad.keys() == first.bad.keys()
    assert len(second.looks) == 2
    # Of the second epoch's look alone, its range would be that of what was read there.
    (name, (low, high)), *_ = first._ranges.items()
    assert second._ranges[name] != (low, high)
    assert abs(second._ranges[name][1] - high) < 0.2 * (high - low)


class CalledTwice(Classifier):
    """Has a layer that reads what it has answered, a hundred times as large."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 4)), lr=1e-4)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = self.net[0](batch[0])
        return nn.functional.cross_entropy(self.net[2](self.net[1](100 * self.net[1](x))), batch[1])


def test_calls_of_one_layer_in_a_batch_are_one_look(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(seeded(CalledTwice), QuantizationMonitor(1), logger=logger)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["quant/monitor/net.1/drift"]]
    assert all(0.5 < float(row["quant/monitor/net.1/drift"]) < 2 for row in rows)
    assert all(float(row["quant/monitor/net.1/clipped"]) < 0.1 for row in rows)


def test_penalty_flattens_weights() -> None:
    def ended(strength: float) -> float:
        module = seeded(Mlp)
        nn.init.normal_(module.net[1].weight, std=0.1)
        monitor = QuantizationMonitor(regularize=strength)
        fit(module, monitor, max_epochs=8)
        return monitor._weight(module.net[1]).kurtosis

    assert ended(1.0) < ended(0.0) - 0.1


@pytest.mark.parametrize("argument", ["every_n_steps", "bits", "alarm_db", "alarm_spread", "regularize"])
def test_wrong_arguments_are_refused(argument: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"Expected `{argument}` to be"):
        QuantizationMonitor(**{argument: -1})


def test_nothing_to_look_at_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="Expected layers to look at"):
        fit(seeded(), QuantizationMonitor(exclude=["Conv2d", "Linear"]))


@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
def test_what_it_saw_is_in_the_report_and_in_checkpoints(tmp_path: Path) -> None:
    monitor, quantizing = QuantizationMonitor(2), PostTrainingQuantization(output_dir=tmp_path / "artifact")
    fit(seeded(Mlp), monitor, quantizing, max_epochs=2)
    assert quantizing.artifact is not None
    assert quantizing.artifact.report is not None
    looks = quantizing.artifact.report["looks"]
    assert [look["epoch"] for look in looks] == [epoch for epoch, _ in monitor.looks]
    assert looks[0]["epoch"] < 1 < looks[-1]["epoch"] <= 2
    assert set(looks[0]["db"]) == {"net.1", "net.3"}
    assert "While training" in (tmp_path / "artifact" / "report.html").read_text()
    again = QuantizationMonitor()
    again.load_state_dict(monitor.state_dict())
    assert again.monitored == monitor.monitored


def test_of_many_looks_every_second_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_quant.callbacks.monitor._MAX_LOOKS", 8)
    monitor = QuantizationMonitor()
    for index in range(30):
        monitor._keep(index / 10, {"net": {"weight_db": 40.0, "input_db": 30.0 + index}})
    assert len(monitor.looks) <= 8
    assert monitor.looks[-1] == (2.9, {"net": 40.0})
