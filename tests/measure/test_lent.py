"""A validation that looks at its run sees it when it is measured beside it, and changes nothing there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from lightning_models import Classifier, fit, seeded
from torch.utils.data import DataLoader

from lightning_quant.callbacks.training_data import independent_copy
from lightning_quant.measure.evaluate import evaluate
from lightning_quant.measure.lent import LentLogger, Shown, lent_loggers


class Counter(Callback):
    """Counts the validations of the run."""

    def __init__(self) -> None:
        self.number = 0

    def on_validation_end(self, *_: Any) -> None:
        self.number += 1


class Data(LightningDataModule):
    """The data of the classifier, with a size that it is asked for."""

    classes = 4

    def train_dataloader(self) -> DataLoader:
        return Classifier().train_dataloader()

    def val_dataloader(self) -> DataLoader:
        return Classifier().val_dataloader()


class Curious(Classifier):
    """Looks, while it validates, at all that a run has."""

    def setup(self, stage: str) -> None:
        self.classes = self.trainer.datamodule.classes

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.25)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("rate", self.lr_schedulers().get_last_lr()[0], on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        trainer = self.trainer
        counter = next(callback for callback in trainer.callbacks if isinstance(callback, Counter))
        self.optimizers().step()
        (Path(self.logger.save_dir) / "seen.txt").write_text(str(trainer.log_dir))
        self.log("rates", self.optimizers().param_groups[0]["lr"] + self.lr_schedulers().get_last_lr()[0])
        self.log("classes", float(self.classes))
        self.log("validations", float(counter.number))
        self.log("rate_before", trainer.callback_metrics["rate"])
        self.log("is_last", float(self.current_epoch == trainer.max_epochs - 1))


def test_validation_sees_what_the_run_has_and_leaves_it(tmp_path: Path) -> None:
    module, counter = seeded(Curious), Counter()
    logger = CSVLogger(tmp_path)
    trainer = fit(module, counter, max_epochs=2, logger=logger, num_sanity_val_steps=0, data=Data())
    (tmp_path / "seen.txt").unlink()
    weights = module.net.head.weight.clone()
    metrics = evaluate(trainer, module, "net")

    known = {"rates": 0.5, "classes": 4, "validations": 2, "rate_before": 0.25, "is_last": 1}
    assert {name: metrics[name] for name in known} == pytest.approx(known)
    assert counter.number == 2
    assert torch.equal(module.net.head.weight, weights)
    assert not (tmp_path / "seen.txt").exists()
    assert trainer.callbacks.count(counter) == 1
    assert independent_copy(trainer, module).lr_schedulers().get_last_lr() == [0.25]
    assert [type(logger) for logger in lent_loggers(trainer)] == [LentLogger]


def test_what_is_shown_is_of_its_class_and_does_nothing() -> None:
    counter = Counter()
    seen = Shown(counter, frozenset(["on_validation_end"]), state={})
    seen.on_validation_end()

    assert isinstance(seen, Counter)
    assert type(seen).__name__ == "Counter"
    assert (seen.number, counter.number, seen.state) == (0, 0, {})
    with pytest.raises(AttributeError):
        _ = seen.other
