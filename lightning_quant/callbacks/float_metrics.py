"""The float weights, validated once for all files that are compared with them."""

import functools
from typing import Any

from lightning.pytorch import Trainer

from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.deployment import Deployment, Known
from lightning_quant.calls.calls import Call
from lightning_quant.measure.attempts import noting
from lightning_quant.measure.changed_predictions import Predictions, alone
from lightning_quant.measure.contributions import Metrics
from lightning_quant.measure.evaluate import evaluate


def float_metrics(callback: QuantizationCallback, trainer: Trainer, deployment: Deployment) -> Known:
    """Return what validation says of the float weights, with what each batch adds; empty where it is not to run.

    Args:
        callback: whose settings and module are meant; what several artifacts of one training share is made once.
        trainer: whose validation counts.
        deployment: the weights.
    """
    if not callback.settings.evaluate:
        return Known(Metrics())

    def measure() -> Known:
        calls, missing, floating = list[Call](), list[str](), Metrics()
        predictions = Predictions(functools.partial(alone, deployment.model))
        how: dict[str, Any] = {"limit_batches": callback.settings.limit_eval_batches, "group": callback.group}
        how |= {"recorded": calls, "contributions": True, "watch": predictions.of_float}
        with noting(missing, "the metrics of validation are", alone=callback.group.size == 1), deployment.as_trained():
            floating = evaluate(trainer, deployment.pl_module, callback.path, **how)
        return Known(floating, calls, predictions=predictions, missing=tuple(missing))

    once = callback.shared.once(("float metrics", callback.path), measure)
    callback.missing += once.missing
    return Known(once.floating, once.calls, predictions=once.predictions)
