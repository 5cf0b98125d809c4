"""What scoring a validation adds to it, in CPU time and in calls of the module: images of 64x64, 32 batches of 16.

`python examples/benchmarks/scores.py` validates in fits with and without `score_every`, in turn.
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

BATCHES, BATCH = 32, 16


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


def validated(net: Callable[[], nn.Module], epochs: int, make: Callable[..., Any], **options: Any) -> list[float]:
    """Return the CPU seconds of each validation of a fit with four training batches an epoch."""
    seconds: list[float] = []
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt, SystemExit):
        callbacks = [make(output_dir=folder, **options)] if make else []
        Trainer(
            max_epochs=epochs,
            callbacks=[Validations(seconds), *callbacks],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_train_batches=4,
        ).fit(Classifier(net()))
    return seconds[1:]


def main() -> None:
    """Validate in each way, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    for name, net in (("ResNet18", resnet18), ("MobileNetV2", mobilenet_v2)):
        plain = validated(net, arguments.epochs, lq.PostTrainingQuantization)
        rows.append((name, "not scored, float", f"{median_ms(plain):.0f}", ""))
        for how, make, options in (
            ("PostTrainingQuantization(score_every=1)", lq.PostTrainingQuantization, {}),
            ("QuantizationAwareTraining(score_every=1)", lq.QuantizationAwareTraining, {}),
        ):
            base = plain if make is lq.PostTrainingQuantization else validated(net, arguments.epochs, make)
            scored = validated(net, arguments.epochs, make, score_every=1, **options)
            rows.append((name, how, f"{median_ms(scored):.0f}", f"{bootstrap_ratio(scored, base):.2f}"))
            print(rows[-1], median_ms(base))
    publish("scores", table(rows, ("net", "validation", "median CPU ms", "this / not scored [95 %]")))


if __name__ == "__main__":
    main()
