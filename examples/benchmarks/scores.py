"""What a look at integers costs while training, in CPU time: images of 64x64, validations of 64 batches of 16.

`python examples/benchmarks/scores.py` validates with and without `score_every`, and trains with and without
`QuantizationMonitor`, each batch looked at.
"""

import argparse
import contextlib
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import Callback, LightningModule, Trainer
from reference_models import mobilenet_v2, resnet18
from results import publish
from timing import bootstrap_ratio, median_ms, table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq

BATCHES, BATCH = 64, 16


class Classifier(LightningModule):
    """A module as users write it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.data = TensorDataset(torch.randn(BATCHES * BATCH, 3, 64, 64), torch.randint(1000, (BATCHES * BATCH,)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Learn."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Validate."""
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Step."""
        return torch.optim.SGD(self.parameters(), 1e-3)

    def train_dataloader(self) -> DataLoader:
        """Give the data."""
        return DataLoader(self.data, BATCH)

    val_dataloader = train_dataloader


class Steps(Callback):
    """Takes the CPU time of each training batch with all that callbacks do in it, and ends the fit."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self._start = seconds, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count from one batch's start to the next one's."""
        now = time.process_time()
        if batch_idx > 1:
            self.seconds.append(now - self._start)
        self._start = now


class Validations(Callback):
    """Takes the CPU time of each validation, first of all callbacks and last, and ends the fit before its artifact."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self._start = seconds, 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._start = time.process_time()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count."""
        self.seconds.append(time.process_time() - self._start)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        raise KeyboardInterrupt


def fit(net: Callable[[], nn.Module], *callbacks: Callback, **options: Any) -> None:
    """Fit a network of fixed random weights."""
    torch.manual_seed(0)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {"accelerator": "cpu", "num_sanity_val_steps": 0, **dict.fromkeys(quiet, False), **options}
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        Trainer(callbacks=list(callbacks), **settings).fit(Classifier(net()))


def validated(net: Callable[[], nn.Module], epochs: int, make: Callable[..., Any], **options: Any) -> list[float]:
    """Return the CPU seconds of each validation of a fit but the first, with four training batches an epoch."""
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        callback = make(output_dir=folder, **options)
        fit(net, Validations(seconds), callback, max_epochs=epochs, limit_train_batches=4)
    return seconds[1:]


def stepped(net: Callable[[], nn.Module], *callbacks: Callback) -> list[float]:
    """Return the CPU seconds of each training batch."""
    seconds: list[float] = []
    fit(net, Steps(seconds), *callbacks, max_epochs=1, limit_val_batches=0, limit_train_batches=16)
    return seconds


def main() -> None:
    """Validate in each way, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batches", type=float, default=None, help="`score_batches`, as a share")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows, looks = [], []
    for name, net in (("ResNet18", resnet18), ("MobileNetV2", mobilenet_v2)):
        step, look = stepped(net), stepped(net, lq.QuantizationMonitor(1))
        share = (median_ms(look) / median_ms(step) - 1) / 100
        looks.append((name, f"{median_ms(step):.0f}", f"{median_ms(look):.0f}", f"{share:.2%}"))
        for make in (lq.PostTrainingQuantization, lq.QuantizationAwareTraining):
            base = validated(net, arguments.epochs, make)
            rows.append((name, f"{make.__name__}()", f"{median_ms(base):.0f}", ""))
            scored = validated(net, arguments.epochs, make, score_every=1, score_batches=arguments.batches)
            row = f"{make.__name__}(score_every=1)", f"{median_ms(scored):.0f}", f"{bootstrap_ratio(scored, base):.2f}"
            rows.append((name, *row))
    publish(
        "scores",
        table(rows, ("net", "validation", "median CPU ms", "this / not scored [95 %]")),
        table(looks, ("net", "a step, median CPU ms", "one that is looked at", "more of all steps, every 100th")),
    )


if __name__ == "__main__":
    main()
