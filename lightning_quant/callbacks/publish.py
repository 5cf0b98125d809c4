"""Send a report to the terminal, to every logger and to the Trainer's metrics, under keys that tell callbacks apart."""

import collections

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_quant.artifact.artifact import Artifact
from lightning_quant.callbacks.announce import warn
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.loggers import Entry, write_down
from lightning_quant.report.report import Report


def publish(callback: QuantizationCallback, trainer: Trainer, report: Report, artifact: Artifact) -> None:
    """Send a report to the terminal, to every logger what it holds, and numbers to `trainer.callback_metrics`."""
    rank_zero_info(f"{report}\nArtifact: {artifact.path}")
    prefix = prefix_of(callback, trainer)
    scalars = report.scalars(prefix)
    entry = Entry(prefix, trainer.global_step, callback.hyperparameters(), report, artifact)
    for logger in trainer.loggers:
        try:
            logger.log_metrics(scalars, step=trainer.global_step)
            write_down(logger, entry)
        except Exception as error:
            # A service that is away, a quota, a full disk: the artifact is safe with its report, and the fit is to end.
            warn(f"{type(logger).__name__} did not take all of the report of {artifact.path}: {error!r}.")
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
    # Last, since a warning may be an error to the user.
    for warning in report.warnings:
        warn(f"{artifact.path}: {warning}.")


def prefix_of(callback: QuantizationCallback, trainer: Trainer) -> str:
    """Return what a callback's keys begin with: "quant", and its name where it has one or is not the only one.

    Where nobody named them, several are told apart by recipe and runtime, with the module where those are the same, and
    a number where that is, too.
    """
    if callback.settings.name is not None:
        return f"quant/{callback.settings.name}"
    every = [c for c in trainer.callbacks if isinstance(c, QuantizationCallback)]  # type: ignore[attr-defined]
    if len(every) < 2:
        return "quant"
    unnamed = [c for c in every if c.settings.name is None]
    names = [f"{c.settings.recipe.name}-{c.settings.runtime}" for c in unnamed]
    counts = collections.Counter(names)
    names = [f"{n}-{c.path}" if counts[n] > 1 and c.path else n for n, c in zip(names, unnamed, strict=True)]
    position = next(i for i, c in enumerate(unnamed) if c is callback)
    before = names[:position].count(names[position])
    return f"quant/{names[position]}" + (f"-{before + 1}" if before else "")
