"""A Trainer that validates beside another one, as that does, and says nothing."""

import logging
import warnings

import lightning_models
import torch
from lightning.pytorch import Callback

from lightning_quant.calibrate.distributed import Group
from lightning_quant.measure.validation_trainer import quiet, validation_trainer


def test_it_has_the_limits_and_progress_of_the_other_and_none_of_its_loggers() -> None:
    trainer = lightning_models.make_trainer(limit_val_batches=3, precision="bf16-mixed")
    trainer.fit_loop.epoch_progress.current.started = 4
    watching = Callback()
    evaluator = validation_trainer(trainer, torch.device("cpu"), None, Group(), watching)

    assert type(evaluator) is type(trainer)
    assert (evaluator.limit_val_batches, evaluator.precision) == (3, "bf16-mixed")
    assert evaluator.current_epoch == 3
    assert watching in evaluator.callbacks
    assert evaluator.checkpoint_callback is None
    assert validation_trainer(trainer, torch.device("cpu"), 1, Group(), watching).limit_val_batches == 1


def test_weights_of_half_precision_are_measured_in_float32() -> None:
    trainer = lightning_models.make_trainer(precision="bf16-true")
    assert validation_trainer(trainer, torch.device("cpu"), 1, Group(), Callback()).precision == "32-true"


def test_what_was_silenced_speaks_again() -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = logger.level
    with quiet():
        assert logger.level == logging.ERROR
        warnings.warn("not seen", UserWarning, stacklevel=1)
    assert logger.level == before
