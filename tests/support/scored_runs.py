"""Fits that are scored while they validate, and end before an artifact is made."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_models import EnoughError, StopAfterTraining, make_trainer

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.callbacks.base import QuantizationCallback

BOTH = pytest.mark.parametrize("kind", [PostTrainingQuantization, QuantizationAwareTraining])
TWIN, DELTA = "quant/twin/val_loss", "quant/twin_delta/val_loss"


class Seen(Callback):
    """Keeps what ModelCheckpoint and EarlyStopping may read at the end of each validation."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def trained(
    module: LightningModule, *callbacks: Callback, ckpt_path: Any = None, **options: Any
) -> list[dict[str, float]]:
    """Train without an artifact, and return the metrics after each validation."""
    seen = Seen()
    trainer = make_trainer(seen, *callbacks, StopAfterTraining(), **options)
    with pytest.raises(EnoughError):
        trainer.fit(module, ckpt_path=ckpt_path)
    return seen.metrics


def make(kind: type[QuantizationCallback], tmp_path: Path, **options: Any) -> Any:
    """Make a callback that scores all batches, unless it is told otherwise."""
    every = options.get("score_every", 1)
    batches = {} if every is None else {"score_batches": 1.0}
    return kind(output_dir=tmp_path / "artifact", **{"score_every": every, **batches, **options})


def without_scores(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in one.items() if "twin" not in name} for one in metrics]
