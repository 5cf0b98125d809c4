"""When fit has ended: make the artifact of the weights to export, measure it, and log it."""

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_quant.artifact import artifact as artifacts
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.artifact.labels import class_labels
from lightning_quant.callbacks.announce import warn
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.by_chance import in_words
from lightning_quant.callbacks.deployment import Deployment
from lightning_quant.callbacks.directions import watched
from lightning_quant.callbacks.file_metrics import metrics_of_file
from lightning_quant.callbacks.held_out import held_out
from lightning_quant.callbacks.monitor import QuantizationMonitor
from lightning_quant.callbacks.publish import publish
from lightning_quant.calls.calls import Call
from lightning_quant.errors import DiskError
from lightning_quant.export.engines import AUTO
from lightning_quant.export.export import export
from lightning_quant.machine.timed import timed
from lightning_quant.measure.attempts import noting
from lightning_quant.measure.changed_predictions import Predictions, alone
from lightning_quant.measure.contributions import Metrics, differences
from lightning_quant.measure.evaluate import evaluate, why_no_metrics
from lightning_quant.measure.rounded_parts import all_but
from lightning_quant.measure.sensitivity import Sensitivity
from lightning_quant.measure.thumbnails import tokenizer_of
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.planned.sizes import notes_of_sizes
from lightning_quant.report.make_report import make_report, with_section
from lightning_quant.report.metrics import MetricRow
from lightning_quant.report.page import to_html
from lightning_quant.report.report import Report
from lightning_quant.simulate.prepared import Prepared


def finish(callback: QuantizationCallback, trainer: Trainer, deployment: Deployment) -> Artifact:
    """Export, evaluate the artifact with the user's validation, report to files, terminal and loggers."""
    group, folder = callback.group, callback.last_folder
    # A run that started from a checkpoint, without training, is started again in the same way.
    advice = "" if callback.notes else f" If this is interrupted: {callback.way_back(trainer)}"
    rank_zero_info(f"{type(callback).__name__}: writing {folder}.{advice}")
    deployment.model.observe_unreached()
    artifact = callback.artifact = group.on_first(_export, callback, trainer, deployment, folder)
    with contextlib.ExitStack() as stack:
        # Measured on a copy: another run may replace the artifact meanwhile.
        own = group.together(stack.enter_context, artifacts.private_copy(artifact))
        result = _measure(callback, trainer, deployment, artifact, own)
    # Loggers write in the first process alone, as always.
    trainer.strategy.barrier("lightning_quant")
    return result


def _measure(
    callback: QuantizationCallback, trainer: Trainer, deployment: Deployment, artifact: Artifact, own: Artifact
) -> Artifact:
    """Evaluate and measure a private copy of an artifact, and add the report to the artifact."""
    metrics: tuple[MetricRow, ...] = ()
    notes = (*callback.findings, *deployment.notes, *notes_of_sizes(deployment.model))
    calls: list[Call] = []
    tokenizer = tokenizer_of(deployment.pl_module, getattr(trainer, "datamodule", None), deployment.model.root)
    one, shown = functools.partial(_alone, callback, deployment.model), callback.settings.show_samples
    predictions = Predictions(one, tokenizer, shown=shown)
    if callback.settings.evaluate:
        with timed(callback.seconds, "evaluate"):
            metrics, by_chance = _metrics(callback, trainer, deployment, own, calls, predictions)
            notes += by_chance
            if any(row.artifact is not None for row in metrics) and deployment.sensitivity is not None:
                gains: dict[str, float] = {}
                with noting(callback.missing, "what metrics gain by sensitivity's advice is"):
                    gains = _gains(callback, trainer, deployment, deployment.sensitivity)
                sensitivity = deployment.sensitivity.with_gains(
                    gains, {row.name: row.higher_is_better for row in metrics}
                )
                deployment = replace(deployment, sensitivity=sensitivity)
        if callback.loss_inputs is not None and callback.loss_inputs.formula is None:
            notes = (*notes, "metrics that use the model's own loss are missing: the artifact takes no labels")
        if not metrics and not any("metrics" in text for text in callback.missing):
            notes = (*notes, f"no validation metrics: {why_no_metrics(trainer)}")
    held = held_out(callback, trainer, deployment.pl_module, calls)
    deployment = replace(deployment, notes=notes, held=held)
    return callback.group.on_first(_report, callback, trainer, deployment, artifact, own, metrics, predictions)


def _alone(callback: QuantizationCallback, model: PlannedModel, call: Call, place: int) -> list[Tensor] | None:
    """Return the tensors of one sample of a call, labels left out."""
    if callback.loss_inputs is not None:
        bound = callback.loss_inputs.split(*call)[0]
        call = Call(bound.args, bound.kwargs)
    return alone(model, call, place)


def _export(callback: QuantizationCallback, trainer: Trainer, deployment: Deployment, folder: Path) -> Artifact:
    model = deployment.model
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    classes = class_labels(deployment.pl_module, model.root, getattr(trainer, "datamodule", None), dataset)
    return export(
        model,
        folder,
        dynamic_shapes=callback.settings.dynamic_shapes,
        classes=classes,
        seconds=callback.seconds,
        engine=callback.settings.engine,
    )


def _report(
    callback: QuantizationCallback,
    trainer: Trainer,
    deployment: Deployment,
    artifact: Artifact,
    own: Artifact,
    metrics: tuple[MetricRow, ...],
    predictions: Predictions,
) -> Artifact:
    report = make_report(
        deployment.model,
        own,
        metrics=metrics,
        seconds=callback.seconds,
        checkpoint_bytes=_bytes_of(deployment.checkpoint),
        threads=callback.settings.threads,
        notes=deployment.notes,
        missing=tuple(callback.missing),
        sensitivity=deployment.sensitivity,
        step_share=callback.step_share,
        trained=callback.trains_rounded,
        held=deployment.held,
        limits=callback.settings.limits,
        predictions=predictions,
        peers=callback.shared.peers,
        chosen=callback.settings.runtime == AUTO,
    )
    looks = next((c.monitored for c in trainer.callbacks if isinstance(c, QuantizationMonitor)), None)  # type: ignore[attr-defined]
    for section in (looks, deployment.scored, deployment.search):
        report = with_section(report, section)
    artifact, refused = _with_report(artifact, own, report)
    # Known before it is told, since a warning may be an error to the user.
    callback.artifact = artifact
    publish(callback, trainer, report, artifact)
    if refused:
        warn(f"{refused} Until then the terminal and loggers alone have the report.")
    return artifact


def _with_report(artifact: Artifact, own: Artifact, report: Report) -> tuple[Artifact, str]:
    """Return an artifact with its report, and what the disk says where it has no room for one."""
    try:
        return artifacts.add_report(artifact, report.to_dict(), report.to_markdown(), to_page=to_html, own=own), ""
    except DiskError as error:
        return artifact, str(error)


def _bytes_of(checkpoint: Path | None) -> int | None:
    """Return the size of a checkpoint; None where there is none, any more."""
    try:
        return None if checkpoint is None else checkpoint.stat().st_size
    except OSError:
        return None


def _metrics(
    callback: QuantizationCallback,
    trainer: Trainer,
    deployment: Deployment,
    own: Artifact,
    calls: list[Call],
    predictions: Predictions,
) -> tuple[tuple[MetricRow, ...], tuple[str, ...]]:
    """Return metrics and what to know of them; append a call of validation to `calls`, and note what is predicted."""
    group, known, float_values = callback.group, deployment.known, Metrics()
    attempt = functools.partial(noting, callback.missing, alone=group.size == 1)
    if known is None:
        how: dict[str, Any] = {"limit_batches": callback.settings.limit_eval_batches, "group": group}
        how |= {"watch": predictions.of_float, "recorded": calls}
        with attempt("the metrics of validation are"), deployment.as_trained():
            float_values = evaluate(trainer, deployment.pl_module, callback.path, **how)
    else:
        float_values, calls[:] = known.floating, known.calls
        predictions.take_float(known.predictions)
    if not float_values:
        return (), ()
    exported, number, simulated = metrics_of_file(callback, trainer, deployment, own, predictions)
    before = callback.metrics_before
    margins: dict[str, float | None] = {}
    with attempt("the intervals of metrics are"):
        margins = {name: one.margin for name, one in differences(exported, float_values).items()}
    directions = watched(trainer, callback._checkpoint) | float_values.higher_is_better
    rows = tuple(
        MetricRow(name, value, simulated.get(name), exported.get(name), before.get(name), number, *others)
        for name, value in float_values.items()
        for others in [(directions.get(name), margins.get(name))]
    )
    return rows, _by_chance(callback, trainer, deployment, float_values)


def _by_chance(
    callback: QuantizationCallback, trainer: Trainer, deployment: Deployment, once: Metrics
) -> tuple[str, ...]:
    """Say how far the metrics of float move by random numbers that validation draws, where it does."""
    how: dict[str, Any] = {"limit_batches": callback.settings.limit_eval_batches, "group": callback.group}
    alone = callback.group.size == 1
    with noting(callback.missing, "how far metrics move by chance is", alone=alone):
        seeds = (1, 2) if once.draws else ()
        with deployment.as_trained():
            others = [evaluate(trainer, deployment.pl_module, callback.path, **how, seed=seed) for seed in seeds]
        return (in_words([once, *others]),) if others else ()
    return ()


def _gains(
    callback: QuantizationCallback, trainer: Trainer, deployment: Deployment, sensitivity: Sensitivity
) -> dict[str, float]:
    """Return how the user's metrics change with what is advised to be kept float."""
    if sensitivity.advice is None:
        return {}
    prepared = Prepared.of(deployment.model)
    limit, values = callback.settings.limit_eval_batches, []
    for left_out in ((), sensitivity.advice.names):
        with prepared.simulation.quantizing_only(all_but(prepared, left_out)), prepared.attached("frozen"):
            values.append(evaluate(trainer, deployment.pl_module, callback.path, limit_batches=limit))
    return {name: values[1][name] - value for name, value in values[0].items()}
