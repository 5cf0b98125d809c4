"""LeNet-5 in every precision: trained in float and, for each engine, through rounding; artifacts side by side.

`python examples/lenet_all_ways.py` takes two minutes on two cores and needs no download.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from digits import Digits
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.terminal.tables import text_table

EPOCHS = 8
OUTPUT = Path("lenet_output")
AFTER_FIT = {
    "float16": {"recipe": "float16", "runtime": "torch"},
    "bfloat16": {"recipe": "bfloat16", "runtime": "torch"},
    "dynamic int8": {"recipe": "int8_dynamic", "runtime": "torch"},
    "dynamic int8, ONNX Runtime": {"recipe": "int8_dynamic", "runtime": "onnxruntime"},
    "static int8 after training, ONNX Runtime": {"runtime": "onnxruntime"},
    "static int8 after training, fbgemm": {"runtime": "torch", "engine": "fbgemm"},
    "static int8 after training, qnnpack": {"runtime": "torch", "engine": "qnnpack"},
}
DURING_FIT = {
    "static int8, QAT, ONNX Runtime": {"runtime": "onnxruntime"},
    "static int8, QAT, fbgemm": {"runtime": "torch", "engine": "fbgemm"},
    "static int8, QAT, qnnpack": {"runtime": "torch", "engine": "qnnpack"},
}


class LeNet(LightningModule):
    """LeNet-5 for images `(batch, 3, 32, 32)`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log accuracy."""
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train with Adam."""
        return torch.optim.Adam(self.parameters(), 2e-3)


class LargeDigits(Digits):
    """The digits of 8x8 pixels as images of 3x32x32."""

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Enlarge each pixel and repeat the channel."""
        images, labels = batch
        return F.interpolate(images, scale_factor=4).repeat(1, 3, 1, 1), labels


def train(callbacks: list[lq.PostTrainingQuantization] | list[lq.QuantizationAwareTraining]) -> None:
    """Train from the same start on the same batches."""
    seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=EPOCHS, callbacks=list(callbacks), enable_checkpointing=False, **quiet)
    trainer.fit(LeNet(), LargeDigits())


def main() -> None:
    """Train in every way and print one table."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", category=lq.errors.NoEffectWarning)
    after = {name: lq.PostTrainingQuantization(**_options(name, how)) for name, how in AFTER_FIT.items()}
    during = {name: lq.QuantizationAwareTraining(**_options(name, how)) for name, how in DURING_FIT.items()}
    train(list(after.values()))
    for callback in during.values():
        train([callback])
    scalars = {name: callback.artifact.report["scalars"] for name, callback in {**after, **during}.items()}
    base = next(iter(scalars.values()))
    rows = [("float32, PyTorch", *_cells(base, "quant/float_bytes", "quant/float/accuracy", "quant/float_latency_ms"))]
    keys = ("quant/artifact_bytes", "quant/artifact/accuracy", "quant/latency_ms")
    rows += [(name, *_cells(values, *keys)) for name, values in scalars.items()]
    print(text_table(("LeNet-5", "bytes", "accuracy", "ms for 1 image", "ms for 32"), rows))


def _options(name: str, how: dict[str, str]) -> dict[str, Any]:
    return {**how, "output_dir": OUTPUT / name.replace(" ", "_"), "threads": 1}


def _cells(scalars: dict[str, float], size: str, accuracy: str, time: str) -> tuple[str, ...]:
    times = (f"{scalars[f'{time}/batch_{batch}']:.3f}" for batch in (1, 32))
    return f"{scalars[size]:,.0f}", f"{scalars[accuracy]:.4f}", *times


if __name__ == "__main__":
    main()
