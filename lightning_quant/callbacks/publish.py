"""Send a report to the terminal, to every logger and to the Trainer's metrics, under keys that tell callbacks apart."""

import logging
import sys

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_quant.artifact.artifact import Artifact
from lightning_quant.callbacks.announce import warn
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.loggers import Entry, write_down
from lightning_quant.callbacks.scored_validation import prefix_of
from lightning_quant.report.report import Report
from lightning_quant.terminal.shown_report import in_color, print_markdown


def tell(markdown: str, line: str) -> None:
    """Write Markdown, and a line behind it, where Lightning writes what it has to say; in Rich's look in a terminal."""
    if in_color(sys.stderr) and logging.getLogger("lightning.pytorch").isEnabledFor(logging.INFO):
        print_markdown(markdown, sys.stderr)
        rank_zero_info(line)
    else:
        rank_zero_info(f"{markdown}\n{line}")


def publish(callback: QuantizationCallback, trainer: Trainer, report: Report, artifact: Artifact) -> None:
    """Send a report to the terminal, to every logger what it holds, and numbers to `trainer.callback_metrics`."""
    tell(str(report), f"Artifact: {artifact.path}")
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
