"""Runs of two processes; started as a script by test_distributed_training.py, once per scenario.

Every process writes what it ended with to `<folder>/<name>-<rank>.pt`.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import BATCH, Classifier, images, make_trainer, seeded, tensors_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, Recipe

# 21 images: after the even ones, a rank has a batch of its own size at the end, and a sampler repeats one.
NUM_VALIDATION = 21
SCHEDULE = {"observe": 0, "fake_quantize": 1, "freeze_observers": 3, "unit": "steps"}
MIN_MAX = Recipe(name="min_max", calibration_observer="min_max")


class Uneven(Classifier):
    """Its two processes see other images, and last batches of another size than the others."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(images(28, seed=1), BATCH)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(images(NUM_VALIDATION, seed=2), 6)


class Branching(nn.Module):
    """Has a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Extremes(Callback):
    """Keeps the extremes of the images that this process trained on, batch by batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen.append((batch[0].min().item(), batch[0].max().item()))


class Failing(Uneven):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and batch_idx == 1:
            raise RuntimeError("the second process failed")
        return super().training_step(batch, batch_idx)


def save(folder: Path, name: str, rank: int, **values: Any) -> None:
    torch.save(values, folder / f"{name}-{rank}.pt")


class Saving(Callback):
    """Writes down what a process ended with, since attributes do not come back from forked ones."""

    def __init__(self, folder: Path, name: str, callback: Any, extremes: Extremes) -> None:
        self.folder, self.name, self.callback, self.extremes = folder, name, callback, extremes

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranges = self.callback.prepared.ranges.state_dict()
        report = self.callback.artifact.report
        save(
            self.folder,
            self.name,
            trainer.global_rank,
            ranges=ranges,
            scores={n: float(v) for n, v in trainer.callback_metrics.items() if "/twin" in n},
            metrics={row["name"]: row for row in report["metrics"]},
            seen=self.extremes.seen,
            tensors=tensors_of(pl_module),
            world=trainer.world_size,
            corrections={k: v.clone() for k, v in self.callback.prepared.bias_corrections.items()},
            steps=getattr(self.callback.prepared.learned_steps, "logarithms", {}),
        )


def run(folder: Path, name: str, callback: Any, module: Any, **options: Any) -> None:
    extremes = Extremes()
    callbacks = [callback, Saving(folder, name, callback, extremes), extremes]
    settings = {"devices": 2, "max_epochs": 2} | options
    if settings.get("enable_checkpointing"):
        callbacks.append(ModelCheckpoint(folder / f"{name}-ckpt", save_last=True))
    make_trainer(*callbacks, default_root_dir=folder, **settings).fit(module)


def main(scenario: str, strategy: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    if scenario == "fails":
        run(folder, "fails", QuantizationAwareTraining(output_dir=folder / "fails"), seeded(Failing), strategy=strategy)
        return
    if scenario == "sync":
        synchronized = QuantizationAwareTraining(output_dir=folder / "sync")
        run(folder, "sync", synchronized, seeded(Uneven), strategy=strategy, accelerator="gpu", sync_batchnorm=True)
        return
    qat = QuantizationAwareTraining(output_dir=folder / "qat", schedule=SCHEDULE, score_every=1, score_batches=1.0)
    run(folder, "qat", qat, seeded(Uneven), strategy=strategy, enable_checkpointing=True)
    if scenario == "short":
        return
    ptq = PostTrainingQuantization(
        output_dir=folder / "ptq", calibration={"num_batches": 4}, score_every=1, score_batches=1.0
    )
    run(folder, "ptq", ptq, seeded(Uneven), strategy=strategy)
    smallest = PostTrainingQuantization(MIN_MAX, output_dir=folder / "min_max", calibration={"num_batches": 4})
    run(folder, "min_max", smallest, seeded(Uneven), strategy=strategy)
    distill = {"weight": 5.0, "layers": ["conv*"]}
    learned = QuantizationAwareTraining(
        "int4_weights", output_dir=folder / "learned", schedule=SCHEDULE, distill=distill
    )
    run(folder, "learned", learned, seeded(Uneven), strategy=strategy)
    unused = QuantizationAwareTraining(output_dir=folder / "unused", schedule=SCHEDULE)
    run(folder, "unused", unused, seeded(Uneven, net=Branching()), strategy=f"{strategy}_find_unused_parameters_true")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("finished")
