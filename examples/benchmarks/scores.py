"""What a look at integers costs while training, in CPU time: images of 64x64, validations of 64 batches of 16.

`python examples/benchmarks/scores.py` scores every second validation of a fit, lets `QuantizationMonitor` look at every
second batch, and trains through rounding with and without `distill`.
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


class Ending(Callback):
    """Ends a fit before its artifact."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        raise KeyboardInterrupt


class Steps(Ending):
    """Takes the CPU time of each training batch with all that callbacks do in it."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self._start = seconds, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count from one batch's start to the next one's."""
        now = time.process_time()
        if batch_idx > 0:
            self.seconds.append(now - self._start)
        self._start = now


class Validations(Ending):
    """Takes the CPU time of each validation, first of all callbacks and last."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self._start = seconds, 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._start = time.process_time()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count."""
        self.seconds.append(time.process_time() - self._start)


def fit(net: Callable[[], nn.Module], *callbacks: Callback, **options: Any) -> None:
    """Fit a network of fixed random weights."""
    torch.manual_seed(0)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {"accelerator": "cpu", "num_sanity_val_steps": 0, **dict.fromkeys(quiet, False), **options}
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        Trainer(callbacks=list(callbacks), **settings).fit(Classifier(net()))


def validated(net: Callable[[], nn.Module], pairs: int, make: Callable[..., Any], share: float | None) -> list[float]:
    """Return the CPU seconds of each validation of a fit, of which every second one is scored, the first one too.

    Training has four batches an epoch. The first validations are left out: with `QuantizationAwareTraining` rounding
    begins after a fifth of the epochs.
    """
    seconds: list[float] = []
    begin = 2 * (1 + pairs // 4)
    with tempfile.TemporaryDirectory() as folder:
        callback = make(output_dir=folder, score_every=2, score_batches=share)
        fit(net, Validations(seconds), callback, max_epochs=begin + 2 * pairs, limit_train_batches=4)
        # A score that fails is a warning, and would be for nothing here.
        assert not callback.missing, callback.missing
    return seconds[begin:]


def stepped(net: Callable[[], nn.Module], *callbacks: Callback) -> list[float]:
    """Return the CPU seconds of each training batch behind the first eight, by when rounding and the loss begin."""
    seconds: list[float] = []
    fit(net, Steps(seconds), *callbacks, max_epochs=1, limit_val_batches=0, limit_train_batches=33)
    return seconds[8:]


def looks(name: str, net: Callable[[], nn.Module]) -> tuple[str, ...]:
    """Return a row: a fit in which every second batch is looked at."""
    seconds = stepped(net, lq.QuantizationMonitor(2))
    look, step = seconds[::2], seconds[1::2]
    more = (median_ms(look) / median_ms(step) - 1) / 100
    return name, f"{median_ms(step):.0f}", f"{median_ms(look):.0f}", f"{more:.2%}"


def lessons(name: str, net: Callable[[], nn.Module]) -> tuple[str, ...]:
    """Return a row: fits with and without a teacher in turns."""
    seconds: dict[float | None, list[float]] = {None: [], 0.5: []}
    for weight in (None, 0.5, 0.5, None):
        with tempfile.TemporaryDirectory() as folder:
            callback = lq.QuantizationAwareTraining(output_dir=folder, distill=weight)
            seconds[weight] += stepped(net, callback)
    alone, taught = seconds.values()
    return name, f"{median_ms(alone):.0f}", f"{median_ms(taught):.0f}", f"{bootstrap_ratio(taught, alone):.2f}"


def scores(name: str, net: Callable[[], nn.Module], pairs: int, share: float | None) -> list[tuple[str, ...]]:
    """Return a row for each callback."""
    rows = []
    for make in (lq.PostTrainingQuantization, lq.QuantizationAwareTraining):
        seconds = validated(net, pairs, make, share)
        scored, plain = seconds[::2], seconds[1::2]
        ratio = f"{bootstrap_ratio(scored, plain):.2f}"
        rows.append((name, make.__name__, f"{median_ms(plain):.0f}", f"{median_ms(scored):.0f}", ratio))
    return rows


def main() -> None:
    """Measure each cost, and print one table of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=6, help="validations that are scored, each beside one that is not")
    parser.add_argument("--batches", type=float, default=None, help="`score_batches`, as a share")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    nets = {"ResNet18": resnet18, "MobileNetV2": mobilenet_v2}
    rows = [row for item in nets.items() for row in scores(*item, arguments.pairs, arguments.batches)]
    header = "net", "callback", "a validation, median CPU ms", "one that is scored", "ratio [95 %]"
    publish(
        "scores",
        table(rows, header),
        table(
            [looks(*item) for item in nets.items()],
            ("net", "a step, median CPU ms", "one that is looked at", "more of all steps, every 100th"),
        ),
        table(
            [lessons(*item) for item in nets.items()],
            ("net", "a rounded step, median CPU ms", "one with `distill=0.5`", "ratio [95 %]"),
        ),
    )


if __name__ == "__main__":
    main()
