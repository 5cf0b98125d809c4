"""The call that `predict_step` makes of the module to quantize, where a LightningModule has one of its own."""

import inspect
from functools import partial

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_quant.callbacks.evaluation_call import difference, rehearsed
from lightning_quant.callbacks.training_data import batches
from lightning_quant.calls.calls import flatten_call
from lightning_quant.capture.capture import Capture, capture
from lightning_quant.capture.namespaces import is_overridden
from lightning_quant.errors import CaptureError
from lightning_quant.graph.analyze import own_signature
from lightning_quant.surgery.routing import resolve


def prediction_call(trainer: Trainer, pl_module: LightningModule, path: str) -> Capture | None:
    """Record the first call that `predict_step` makes of the module at a path, on a batch as validation gets it.

    Returns:
        None where it is not overridden, takes other batches, or calls the module with what no file can take.
    """
    if not is_overridden("predict_step", pl_module):
        return None
    data = "validation" if trainer.enable_validation else "train"
    with rehearsed(trainer, pl_module, data) as duplicate:
        names = list(inspect.signature(duplicate.predict_step).parameters)
        for batch in batches(trainer, pl_module, 1, data):
            try:
                captured = capture(duplicate, partial(duplicate.predict_step, *(batch, 0, 0)[: len(names)]), path)
                flatten_call(own_signature(resolve(duplicate, captured.path)), captured.args, captured.kwargs)
            # The user's own code, on a batch that it may not be made for, tells nothing when it fails.
            except Exception:
                return None
            return captured
    return None


def required_prediction(trainer: Trainer, pl_module: LightningModule, path: str) -> Capture:
    """Record the call that `predict_step` makes.

    Raises:
        CaptureError: there is none.
    """
    captured = prediction_call(trainer, pl_module, path)
    if captured is None:
        raise CaptureError(
            f"Expected `predict_step` of {type(pl_module).__name__} to call {path or 'its forward'!r} on a batch as "
            "validation gets it, but it does not. Use `example='train_batch'`."
        )
    return captured


def finding_of_prediction(module: nn.Module, exported: Capture, prediction: Capture, *, fills: bool) -> str:
    """Say that predict asks for another computation than the one that is exported; empty where it does not.

    Args:
        module: that is quantized.
        exported: the call to export.
        prediction: the call that `predict_step` makes.
        fills: whether a module of the user's can be filled with the artifact, which then answers every call.
    """
    differs = difference(module, exported, prediction, than="the exported call")
    if not differs:
        return ""
    name = repr(exported.path) if exported.path else "the module"
    both = "; `load(path, into=...)` answers both" if fills else ""
    return (
        f"predict calls {name} otherwise: {differs}. The artifact is not of that call; `example='predict_batch'` with "
        f"`evaluate=False` exports it{both}"
    )
