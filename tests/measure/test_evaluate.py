import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning_models import (
    BATCH,
    Classifier,
    ConvNet,
    WithoutValidation,
    equal_tensors,
    fit,
    images,
    seeded,
    tensors_of,
    validate_by_hand,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant.errors import EvaluationError
from lightning_quant.measure.evaluate import evaluate


@pytest.fixture(scope="module")
def module() -> Classifier:
    return seeded()


@pytest.fixture(scope="module")
def trainer(module: Classifier) -> Iterator[Trainer]:
    return fit(module, max_steps=2)


def wrong(x: Tensor) -> Tensor:
    """A model that always answers with the last class."""
    return F.one_hot(torch.full((len(x),), 3), 4).float() * 5


def test_module_as_it_is(trainer: Trainer, module: Classifier) -> None:
    values = evaluate(trainer, module, "net")

    assert values == pytest.approx({**validate_by_hand(module.net.eval(), module.val_dataloader()), "score": 0.0})


def test_target_in_place_of_the_module(trainer: Trainer, module: Classifier) -> None:
    values = evaluate(trainer, module, "net", wrong)
    by_hand = validate_by_hand(wrong, module.val_dataloader())

    assert values["val_accuracy"] == pytest.approx(by_hand["val_accuracy"])
    assert values["val_loss"] == pytest.approx(by_hand["val_loss"])
    assert by_hand["val_loss"] != pytest.approx(
        validate_by_hand(module.net.eval(), module.val_dataloader())["val_loss"]
    )


def test_what_is_routed_is_what_is_measured(trainer: Trainer, module: Classifier) -> None:
    module.net.__dict__["forward"] = wrong
    try:
        values = evaluate(trainer, module, "net")
    finally:
        del module.net.__dict__["forward"]

    assert values["val_loss"] == pytest.approx(validate_by_hand(wrong, module.val_dataloader())["val_loss"])


def test_module_metrics_and_trainer_are_untouched(trainer: Trainer, module: Classifier) -> None:
    module.train()
    module.accuracy.update(torch.eye(4), torch.zeros(4, dtype=torch.long))
    metric_before = [state.clone() for state in module.accuracy.metric_state.values()]
    tensors_before, attributes = tensors_of(module), dict(module.__dict__)
    metrics_before, state = dict(trainer.callback_metrics), trainer.state.fn
    step, loaders = trainer.global_step, trainer.val_dataloaders
    evaluate(trainer, module, "net", wrong)

    assert equal_tensors(tensors_of(module), tensors_before)
    assert all(torch.equal(a, b) for a, b in zip(module.accuracy.metric_state.values(), metric_before, strict=True))
    assert all(child.training for child in module.modules())
    assert module.__dict__ == attributes
    assert not any(child._forward_pre_hooks or "forward" in child.__dict__ for child in module.modules())
    assert module.trainer is trainer
    assert (dict(trainer.callback_metrics), trainer.state.fn, trainer.global_step) == (metrics_before, state, step)
    assert trainer.val_dataloaders is loaders
    module.accuracy.reset()


class Noisy(Classifier):
    """Validates on images with noise from all three generators, in a random order."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        noise = torch.randn(x.shape) + random.random() + float(np.random.random())
        super().validation_step((x + noise, y), batch_idx)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(images(16, seed=2), BATCH, shuffle=True)


@pytest.fixture(scope="module")
def noisy() -> tuple[Trainer, Noisy]:
    module = seeded(Noisy)
    return fit(module, max_steps=1, limit_val_batches=2), module


@pytest.mark.filterwarnings("ignore:Your .val_dataloader.'s sampler has shuffling:UserWarning")
def test_generators_are_given_back(noisy: tuple[Trainer, Noisy]) -> None:
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    evaluate(*noisy, "net")

    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.filterwarnings("ignore:Your .val_dataloader.'s sampler has shuffling:UserWarning")
def test_all_candidates_meet_the_same_random_numbers(noisy: tuple[Trainer, Noisy]) -> None:
    # Otherwise the difference of two models would be that of two draws.
    trainer, module = noisy
    itself = ConvNet()
    itself.load_state_dict(module.net.state_dict())
    itself.eval()

    assert evaluate(trainer, module, "net", itself) == evaluate(trainer, module, "net")


def test_number_of_batches_can_be_limited(trainer: Trainer, module: Classifier) -> None:
    first = validate_by_hand(module.net.eval(), module.val_dataloader(), limit=1)
    whole = validate_by_hand(module.net.eval(), module.val_dataloader())

    assert evaluate(trainer, module, "net", limit_batches=1)["val_loss"] == pytest.approx(first["val_loss"])
    assert evaluate(trainer, module, "net", limit_batches=0.5)["val_loss"] == pytest.approx(first["val_loss"])
    assert evaluate(trainer, module, "net", limit_batches=1.0)["val_loss"] == pytest.approx(whole["val_loss"])


def test_run_without_validation_has_no_metrics() -> None:
    module = seeded(WithoutValidation)

    assert evaluate(fit(module, max_steps=1), module, "net") == {}


def test_run_that_switched_validation_off_has_no_metrics() -> None:
    module = seeded()

    assert evaluate(fit(module, max_steps=1, limit_val_batches=0), module, "net") == {}


# --- what could go unnoticed


class PastForward(Classifier):
    """Never calls the net as a whole in validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net.head(self.net.features(x)), y))


class BesideForward(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("norm", self.net.features(batch[0]).norm())


def test_target_that_is_never_called_is_an_error() -> None:
    module = seeded(PastForward)
    trainer = fit(module, max_steps=1)

    assert "val_loss" in evaluate(trainer, module, "net")
    with pytest.raises(EvaluationError, match="Expected `validation_step` to call 'net', but it never did"):
        evaluate(trainer, module, "net", wrong)


def test_quantized_layer_that_runs_beside_the_target_is_an_error() -> None:
    module = seeded(BesideForward)
    trainer = fit(module, max_steps=1)

    assert "norm" in evaluate(trainer, module, "net", wrong, quantized_layers=("head",))
    with pytest.raises(EvaluationError, match=r"through its forward alone, but \['conv1'\] ran in float beside"):
        evaluate(trainer, module, "net", wrong, quantized_layers=("conv1", "head"))


class CallsItself(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))


def test_whole_lightning_module() -> None:
    module = seeded(CallsItself)
    trainer = fit(module, max_steps=1)
    by_hand = validate_by_hand(wrong, module.val_dataloader())

    assert evaluate(trainer, module, "", wrong)["val_loss"] == pytest.approx(by_hand["val_loss"])


class KeepsTensors(Classifier):
    """Keeps a tensor with a history, a data set and a count on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.last_loss: Tensor | None = None
        self.data = TensorDataset(torch.zeros(1))
        self.num_validations = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.last_loss = super().training_step(batch, batch_idx)
        return self.last_loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.num_validations += 1
        super().validation_step(batch, batch_idx)


def test_module_that_keeps_a_loss_on_itself() -> None:
    module = seeded(KeepsTensors)
    trainer = fit(module, max_steps=1)
    before = module.num_validations
    # As after an interrupted step: this tensor cannot be deep-copied.
    module.last_loss = module.net(images(2).tensors[0]).sum()

    assert evaluate(trainer, module, "net", wrong)["val_loss"] > 0
    assert module.num_validations == before
    assert module.last_loss.requires_grad


def test_several_validation_loaders_keep_their_names() -> None:
    class Two(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            x, y = batch
            self.log("val_loss", F.cross_entropy(self.net(x), y))

        def val_dataloader(self) -> list[DataLoader]:
            return [DataLoader(images(8, seed=seed), BATCH) for seed in (2, 3)]

    module = seeded(Two)
    values = evaluate(fit(module, max_steps=1), module, "net", wrong)
    by_hand = [validate_by_hand(wrong, loader)["val_loss"] for loader in module.val_dataloader()]

    assert list(values) == ["val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"]
    assert list(values.values()) == pytest.approx(by_hand)


class Shifted(LightningDataModule):
    """Normalizes on the device, in its own transfer hook."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(images(16, seed=1), BATCH)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(images(16, seed=2), BATCH)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [(batch[0] - 0.5) / 0.25, batch[1]]


def test_transfer_hooks_of_the_datamodule_are_applied() -> None:
    module = seeded()
    trainer = fit(module, data=Shifted(), max_epochs=1)
    shifted = DataLoader([((x - 0.5) / 0.25, y) for x, y in images(16, seed=2)], BATCH)

    assert evaluate(trainer, module, "net")["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert evaluate(trainer, module, "net")["val_loss"] == pytest.approx(
        validate_by_hand(module.net.eval(), shifted)["val_loss"]
    )


class AsksItsTrainer(Classifier):
    """Reads what belongs to the run in `validation_step`."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("is_shifted", float(isinstance(self.trainer.datamodule, Shifted)))


def test_datamodule_is_there_for_the_validation_step() -> None:
    module = seeded(AsksItsTrainer)

    assert evaluate(fit(module, data=Shifted(), max_steps=1), module, "net")["is_shifted"] == 1.0


def test_hooks_of_the_lightning_module_run_as_in_validation() -> None:
    class AtEpochEnd(Classifier):
        def on_validation_epoch_start(self) -> None:
            self.outputs: list[Tensor] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.outputs.append(self.net(batch[0]).argmax(1))

        def on_validation_epoch_end(self) -> None:
            self.log("share", (torch.cat(self.outputs) == 3).float().mean())

    module: LightningModule = seeded(AtEpochEnd)
    trainer = fit(module, max_steps=1)

    assert evaluate(trainer, module, "net", wrong) == {"share": 1.0}
    assert isinstance(module.net, nn.Module)
