"""Quantization without training, in place of training through rounding that did not begin or is not needed."""

import dataclasses
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer

from lightning_quant.calibrate.calibrate import calibrate
from lightning_quant.callbacks.announce import warn
from lightning_quant.callbacks.deployment import Deployment, choose_weights
from lightning_quant.callbacks.training_data import calibration_steps, working_copy
from lightning_quant.export.prepare import prepare
from lightning_quant.measure.attempts import noting
from lightning_quant.numerics.adjustments import outcomes
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import resolve

if TYPE_CHECKING:
    from lightning_quant.callbacks.qat import QuantizationAwareTraining

# Training batches that ranges are learned from.
NUM_BATCHES = 32
NOTE = "nothing was trained through rounding: the run ended before fake quantization began"


def untrained(callback: "QuantizationAwareTraining", trainer: Trainer, pl_module: LightningModule) -> Deployment:
    """Return the weights of a run that ended before rounding began, calibrated as `PostTrainingQuantization` does.

    Several processes keep the ranges that they have observed by then, and so does a run whose calibration fails.
    """
    way_out = "{'fake_quantize': 1, 'freeze_observers': 3, 'unit': 'epochs'}"
    warn(
        f"QuantizationAwareTraining: {NOTE}. A schedule in fractions counts all of `max_epochs`; where a run may stop "
        f"early, say when it begins, as schedule={way_out}."
    )
    if callback.group.size == 1:
        with noting(callback.missing, "ranges of quantization after training are"):
            chosen = choose_weights(callback, trainer, pl_module, with_ranges=False)
            model = calibrated(callback, trainer, chosen.pl_module)
            note = f"{NOTE}, so it was quantized as after training"
            notes = (*chosen.notes, note, *outcomes(model.accuracy_steps))
            return dataclasses.replace(chosen, model=model, notes=notes)
    chosen = choose_weights(callback, trainer, pl_module, with_ranges=True)
    return dataclasses.replace(chosen, notes=(*chosen.notes, NOTE))


def calibrated(callback: "QuantizationAwareTraining", trainer: Trainer, duplicate: LightningModule) -> Prepared:
    """Return a model over the module of a copy on the CPU, with ranges of training batches."""
    settings, old = callback.settings, callback.require_prepared()
    args, kwargs = old.call()
    made = prepare(
        resolve(duplicate, callback.path),
        args,
        kwargs,
        recipe=settings.recipe,
        runtime=old.plan.runtime,
        selection=settings.selection,
        observer=settings.recipe.calibration_observer,
        module=old.plan.module,
        trains=False,
    )
    old.share_sizes(made)
    made.learns_from_captured = old.learns_from_captured
    working = working_copy(trainer, duplicate)
    bound = made.bound_to(resolve(working, callback.path))
    calibrate(bound, calibration_steps(trainer, working, NUM_BATCHES, 0, "train"))
    made.take_over(bound)
    return made
