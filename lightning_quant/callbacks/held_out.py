"""A call that chose nothing, to compare float and artifact on: of validation, else of a training batch left over."""

import functools
import itertools

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.evaluation_call import run_validation
from lightning_quant.callbacks.training_data import batches, independent_copy, run_training_step, start_hooks
from lightning_quant.calls.calls import Call
from lightning_quant.capture.capture import Capture, capture, isolated_rng, unchanged
from lightning_quant.measure.output_noise import HeldOut
from lightning_quant.surgery.routing import evaluation_mode


def held_out(
    callback: QuantizationCallback, trainer: Trainer, pl_module: LightningModule, evaluated: list[Call]
) -> HeldOut | None:
    """Return a call for the comparison, without the labels that the artifact does not take, and say which it is.

    Args:
        callback: whose module is called.
        trainer: whose data is meant.
        pl_module: the copy whose weights are exported.
        evaluated: the first call that evaluation made of the module, where it ran.

    Returns:
        None where every call took part in the choice of ranges.
    """
    calibration = getattr(callback, "calibration", None)
    data, number = (calibration.data, calibration.num_batches) if calibration else ("train", None)
    # Where validation calls the module otherwise, its first call is the captured one.
    chose = number if data == "validation" else int(callback.exported is not None and callback.exported.otherwise)
    if evaluated and not chose:
        return _bound(callback, evaluated, "the first call of validation, which chose no range")
    recorded = functools.partial(_recorded, callback, trainer, pl_module)
    if trainer.enable_validation and (call := recorded("validation", chose or 0)):
        return _bound(callback, [call], "a call of validation, which chose no range")
    if data == "train" and number is not None and (call := recorded("train", number)):
        return _bound(callback, [call], "a training batch that took no part in calibration")
    if evaluated:
        return _bound(callback, evaluated, "the first call of validation, which took part in calibration")
    return None


def _bound(callback: QuantizationCallback, calls: list[Call], base: str) -> HeldOut:
    if callback.loss_inputs is not None:
        bound = [callback.loss_inputs.split(*call)[0] for call in calls]
        calls = [Call(one.args, one.kwargs) for one in bound]
    return HeldOut(tuple(calls), base)


def _recorded(
    callback: QuantizationCallback, trainer: Trainer, pl_module: LightningModule, data: str, skipped: int
) -> Call | None:
    """Return the first call of the module on the batch behind some others, as calibration would draw them."""
    if callback.group.size > 1:
        # A step that talks to other processes would wait for those that have no such batch.
        return None
    duplicate = independent_copy(trainer, pl_module)
    seed = getattr(getattr(callback, "calibration", None), "seed", 0)
    with isolated_rng(seed), unchanged(pl_module), evaluation_mode(duplicate):
        try:
            batch = next(itertools.islice(batches(trainer, duplicate, skipped + 1, data), skipped, None), None)
            if batch is None:
                return None
            captured = _run(duplicate, batch, data, callback.path)
        # The user's own code, run once more, must not cost the report: the captured call is compared then.
        except Exception:
            return None
    return Call(captured.args, captured.kwargs)


def _run(duplicate: LightningModule, batch: object, data: str, path: str) -> Capture:
    if data == "validation":
        with torch.no_grad():
            return capture(duplicate, functools.partial(run_validation, duplicate, batch), path)
    start_hooks(duplicate, batch)
    return capture(duplicate, functools.partial(run_training_step, duplicate, batch, 0), path)
