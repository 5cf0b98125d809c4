"""A Trainer that runs the validation of another one once more, beside it."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_quant.calibrate.distributed import Group
from lightning_quant.measure.evaluate_shares import lent_strategy
from lightning_quant.surgery.host import HOST


def validation_trainer(
    trainer: Trainer, device: torch.device, limit_batches: int | float | None, group: Group, watching: Callback
) -> Trainer:
    """Return a Trainer that validates on a device as another one does, and says nothing of itself.

    Args:
        trainer: whose data module, precision, limits and progress it has.
        device: where the LightningModule is.
        limit_batches: number or share of validation batches; the trainer's own limit by default.
        group: the processes that trained.
        watching: a callback that keeps what is logged.
    """
    where: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    if device != HOST:
        # The trainer's own, since Lightning has no name for accelerators of others.
        where = {"accelerator": trainer.accelerator, "devices": 1 if device.index is None else [device.index]}
        where["strategy"] = lent_strategy(trainer, device)
    elif group.size > 1:
        where["strategy"] = lent_strategy(trainer, device)
    evaluator = type(trainer)(
        **where,
        **_precision(trainer, device),
        limit_val_batches=trainer.limit_val_batches if limit_batches is None else limit_batches,
        logger=DummyLogger(),
        callbacks=[_DataModuleLender(getattr(trainer, "datamodule", None)), watching],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    _lend_progress(trainer, evaluator)
    return evaluator


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what a Trainer says of devices and workers; the user has read it at the start of fit."""
    loggers = [logging.getLogger(f"{name}.utilities.rank_zero") for name in ("lightning.pytorch", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _DataModuleLender(Callback):
    """Lets `validation_step` see the datamodule without another setup and teardown of it."""

    def __init__(self, datamodule: Any) -> None:
        self.datamodule = datamodule

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation begins: lend the datamodule."""
        trainer.datamodule = self.datamodule  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation ends: take it back before teardown."""
        trainer.datamodule = None  # type: ignore[attr-defined]


def _precision(trainer: Trainer, device: torch.device) -> dict[str, Any]:
    """Return the precision of evaluation: the trainer's, but for weights that are not in float32.

    What is exported is float32: half weights would be another model, and converting would reach shared tensors.
    """
    if str(trainer.precision).endswith("-true"):
        return {"precision": "32-true"}
    plugin: Any = trainer.precision_plugin
    if type(plugin).__name__ == "MixedPrecision" and plugin.device == device.type:
        # Autocast knows its device, which a name of a precision does not tell for accelerators of others.
        return {"plugins": [type(plugin)(plugin.precision, plugin.device)]}
    return {"precision": trainer.precision}


def _lend_progress(trainer: Trainer, evaluator: Trainer) -> None:
    """Let `current_epoch` and `global_step` be those of the last validation while training."""
    begun: Any = trainer.fit_loop.epoch_progress.current
    current: Any = evaluator.fit_loop.epoch_progress.current
    current.ready = current.started = begun.started
    current.processed = current.completed = max(begun.started - 1, 0)
    loop = evaluator.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = trainer.global_step
    loop.manual_optimization.optim_step_progress.total.completed = trainer.global_step
