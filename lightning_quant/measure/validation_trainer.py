"""A Trainer that runs the validation of another one once more, beside it."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from lightning_quant.calibrate.distributed import Group
from lightning_quant.measure.evaluate_shares import lent_strategy
from lightning_quant.measure.lent import Lender, lent_loggers
from lightning_quant.surgery.host import HOST


def validation_trainer(
    trainer: Trainer, device: torch.device, limit_batches: int | float | None, group: Group, watching: Callback
) -> Trainer:
    """Return a Trainer that validates on a device as another one does, and says nothing of itself.

    Args:
        trainer: whose precision, limits and progress it has, and what it lends.
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
        logger=lent_loggers(trainer) or False,
        callbacks=[Lender(trainer), watching],
        default_root_dir=trainer.default_root_dir,
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        inference_mode=trainer.fit_loop.epoch_loop.val_loop.inference_mode,
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
