"""What the user's validation says of an exported file, and of the simulation of it."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from lightning_quant.artifact import artifact as artifacts
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.deployment import Deployment
from lightning_quant.errors import EvaluationError
from lightning_quant.measure.attempts import noting
from lightning_quant.measure.changed_predictions import Predictions
from lightning_quant.measure.contributions import Metrics
from lightning_quant.measure.evaluate import CountedCalls, evaluate, weighted_layers
from lightning_quant.measure.interim import Interim
from lightning_quant.planned.parts import in_parts
from lightning_quant.surgery.routing import clone, resolve


def metrics_of_file(
    callback: QuantizationCallback, trainer: Trainer, deployment: Deployment, own: Artifact, predictions: Predictions
) -> tuple[Metrics, int | None, Metrics]:
    """Return the metrics of a file, how many samples it saw, and the metrics of its simulation.

    They are empty where they cannot be measured, which the callback notes as missing; where validation goes past the
    module, those of the simulation, too, which would be those of float.

    Args:
        callback: whose module and settings are meant.
        trainer: whose validation runs.
        deployment: the weights and the model.
        own: the artifact.
        predictions: note what is predicted.
    """
    attempt = functools.partial(noting, callback.missing, alone=callback.group.size == 1)
    exported, number, simulated, bypassed = Metrics(), None, Metrics(), False
    with attempt("the metrics of the artifact are"):
        try:
            exported, number = _known_or_measured(callback, trainer, deployment, own, predictions)
        except EvaluationError:
            bypassed = True
            raise
    if not bypassed:
        limit = callback.settings.limit_eval_batches
        with attempt("the metrics of the simulation are"), deployment.model.attached("frozen"):
            simulated = evaluate(
                trainer, deployment.pl_module, callback.path, limit_batches=limit, group=callback.group
            )
    return exported, number, simulated


def _known_or_measured(
    callback: QuantizationCallback, trainer: Trainer, deployment: Deployment, own: Artifact, predictions: Predictions
) -> tuple[Metrics, int | None]:
    files = {} if deployment.known is None else deployment.known.files
    if own.model_digest not in files:
        how: dict[str, Any] = {"predictions": predictions, "contributions": deployment.known is not None}
        files[own.model_digest] = evaluate_artifact(callback, trainer, deployment, own, **how)
    return files[own.model_digest]


def evaluate_artifact(
    callback: QuantizationCallback,
    trainer: Trainer,
    deployment: Deployment,
    own: Artifact,
    *,
    contributions: bool = False,
    predictions: Predictions | None = None,
    interim: Interim | None = None,
) -> tuple[Metrics, int | None]:
    """Return the metrics of the file, and the number of samples that it saw where that is known.

    Args:
        callback: whose module and settings are meant.
        trainer: whose validation runs.
        deployment: the weights and the model.
        own: the artifact.
        contributions: as for `evaluate`, and so is `interim`.
        predictions: are noted where one process sees all data.
        interim: see there.
    """
    pl_module, model, path = deployment.pl_module, deployment.model, callback.path
    how: dict[str, Any] = {"limit_batches": callback.settings.limit_eval_batches, "group": callback.group}
    how |= {"contributions": contributions, "interim": interim}
    # Processes see shares of the data each.
    how["watch"] = (
        predictions.of_artifact if predictions is not None and callback.group.size == 1 else contextlib.nullcontext
    )
    if model.runs_inside:
        # The user's own code runs with the artifact's layers: with every call that it makes, not the captured one only.
        filled = clone(pl_module)
        artifacts.open_model(own, into=resolve(filled, path))
        # Its layers are the CPU's: another device would run them with kernels of its own.
        return evaluate(trainer, filled, path, on_cpu=True, **how), None
    target: Callable[..., Any] = in_parts(artifacts.open_model(own), model)
    without_loss = False
    if callback.loss_inputs is not None:
        target = callback.loss_inputs.outside(target)
        without_loss = callback.loss_inputs.formula is None
    counted = CountedCalls(target)
    layers = weighted_layers(model.root, model.evaluated_layers)
    values = evaluate(trainer, pl_module, path, counted, quantized_layers=layers, **how)
    if without_loss:
        for name in [name for name, value in values.items() if math.isnan(value)]:
            del values[name]
    return values, sum(callback.group.gather(counted.num_samples))
