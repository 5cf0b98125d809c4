"""What several recipes cost together: one sweep beside a run of its own for each of them, in CPU seconds.

`python examples/benchmarks/sweep.py` quantizes one checkpoint of each network with the five recipes of
`lightning-quant sweep`, each in a process of its own, and then all at once. What counts is a call of
`quantize_checkpoint`: calibration, export, the user's validation, the report, and what it starts; without imports.
The sweep is to cost no more than 2.5 times the dearest of them. The small CNN calibrates on the default of 32 batches
of 32 images, MobileNetV2 on four, as `accuracy.py` does. `--alone` runs fewer recipes by themselves, the dearest say.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from datasets import (
    CALIBRATION_IMAGES,
    VALIDATION_IMAGES,
    fashion_inputs,
    fashion_mnist,
    mobilenet_inputs,
    mobilenet_probe,
)
from lightning.pytorch import LightningModule, Trainer
from reference_models import fashion_cnn
from results import publish
from timing import table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_quant as lq
from lightning_quant.cli.quantize_command import SWEPT

TOGETHER = "all five, one sweep"
NUM_TRAINING_IMAGES = 1024


class Probe(LightningModule):
    """A classifier of FashionMNIST with a training and a validation step."""

    def __init__(
        self, net: nn.Module, to_inputs: Callable[[Tensor], Tensor], num_batches: int, num_validation: int
    ) -> None:
        super().__init__()
        self.net, self.to_inputs, self.num_batches, self.num_validation = net, to_inputs, num_batches, num_validation
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Classify `(N, C, H, W)`: logits `(N, 10)`."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self(self.to_inputs(batch[0])), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log the accuracy."""
        self.accuracy(self(self.to_inputs(batch[0])), batch[1])
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train all weights."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader:
        """Return what calibration takes its batches from."""
        return self._loader(CALIBRATION_IMAGES, NUM_TRAINING_IMAGES, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Return images that nothing was fitted on."""
        return self._loader(VALIDATION_IMAGES, self.num_validation)

    @staticmethod
    def _loader(part: slice, number: int, *, shuffle: bool = False) -> DataLoader:
        images, labels = (tensor[part][:number] for tensor in fashion_mnist("train"))
        return DataLoader(TensorDataset(images, labels), 32, shuffle=shuffle)


def small() -> Probe:
    """Return a small CNN of random weights: what is measured are seconds."""
    torch.manual_seed(0)
    return Probe(fashion_cnn().eval(), fashion_inputs, 32, 2000)


def mobilenet() -> Probe:
    """Return the probe on MobileNetV2."""
    return Probe(mobilenet_probe(), mobilenet_inputs, 4, 1000)


NETS: Mapping[str, Callable[[], Probe]] = {"small CNN": small, "MobileNetV2 probe": mobilenet}


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def quantize(net: str, recipes: list[str]) -> dict[str, Any]:
    """Quantize a checkpoint, with one recipe or several; return its CPU seconds and how many artifacts there are."""
    torch.set_num_threads(1)
    module = NETS[net]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(**quiet, accelerator="cpu", default_root_dir=folder)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(folder / "last.ckpt", weights_only=True)
        recipe = recipes if len(recipes) > 1 else recipes[0]
        calibration = {"num_batches": module.num_batches}
        callback = lq.PostTrainingQuantization(recipe, output_dir=folder / "made", threads=1, calibration=calibration)
        started = cpu_seconds()
        callback.quantize_checkpoint(folder / "last.ckpt", module, logger=False, enable_progress_bar=False)
        seconds = cpu_seconds() - started
        number = len(list(folder.glob("made/**/manifest.json")))
    return {"seconds": seconds, "artifacts": number}


def measured(net: str, recipes: list[str]) -> float:
    """Quantize in a process of its own; return CPU seconds."""
    command = [sys.executable, __file__, "--net", net, "--recipes", *recipes]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(ran.stdout.splitlines()[-1])
    print(f"{net}, {', '.join(recipes)}: {result}", flush=True)
    if result["artifacts"] != len(recipes):
        raise RuntimeError(f"Expected {len(recipes)} artifacts, but got {result['artifacts']}.")
    return float(result["seconds"])


def rows(net: str, alone: list[str]) -> list[list[str]]:
    """Return the rows of one network: all together, and recipes alone."""
    together = measured(net, list(SWEPT))
    seconds = {recipe: measured(net, [recipe]) for recipe in alone}
    dearest = max(seconds.values())
    every = {TOGETHER: together, **seconds}
    return [[net, name, f"{value:.1f}", f"{value / dearest:.2f}"] for name, value in every.items()]


def main() -> None:
    """Measure all, or quantize once for a process that measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", choices=list(NETS), required=True)
    parser.add_argument("--recipes", nargs="+", default=[])
    parser.add_argument("--alone", nargs="+", default=list(SWEPT))
    options = parser.parse_args()
    if options.recipes:
        print(json.dumps(quantize(options.net, options.recipes)))
        return
    torch.set_num_threads(1)
    header = ["network", "recipe", "CPU s", "of the dearest alone"]
    publish(f"sweep-{options.net.split()[0]}", table(rows(options.net, options.alone), header))


if __name__ == "__main__":
    main()
