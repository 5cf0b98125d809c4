"""Small LightningModules, data and Trainers for the tests."""

import contextlib
import itertools
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

torch.set_num_threads(1)
# A test loads checkpoints of these modules where the package cannot be imported.
with contextlib.suppress(ImportError):
    from quick_exports import make_exports_quick

    make_exports_quick()

NUM_CLASSES = 4
NUM_TRAIN, NUM_VALIDATION, BATCH = 32, 16, 8
NUM_BATCHES = NUM_TRAIN // BATCH


def images(number: int, seed: int = 0) -> TensorDataset:
    """Noise of shape (number, 1, 8, 8) with one bright quadrant, whose index is the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (number,), generator=generator)
    x = 0.5 * torch.randn(number, 1, 8, 8, generator=generator)
    for image, label in zip(x, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[:, row : row + 4, column : column + 4] += 1.0
    return TensorDataset(x, labels)


class ConvNet(nn.Module):
    """Two convolutions with BatchNorm, a residual connection and a linear layer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(16 * width, NUM_CLASSES)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return F.max_pool2d(x, 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Classifier(LightningModule):
    """A classifier whose `training_step` and `validation_step` call `self.net`, as most user code does.

    `score` is logged per epoch and highest in `best_epoch`, for a ModelCheckpoint whose choice is known.
    """

    def __init__(self, net: nn.Module | None = None, *, lr: float = 0.02, best_epoch: int = 0) -> None:
        super().__init__()
        self.net = ConvNet() if net is None else net
        self.accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")
        self.lr, self.best_epoch = lr, best_epoch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        output = self.net(x)
        self.accuracy(output, y)
        self.log("val_loss", F.cross_entropy(output, y))
        self.log("val_accuracy", self.accuracy)
        self.log("score", -abs(float(self.current_epoch - self.best_epoch)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(images(NUM_TRAIN, seed=1), BATCH)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(images(NUM_VALIDATION, seed=2), BATCH)


class WithoutValidation(Classifier):
    validation_step = LightningModule.validation_step
    val_dataloader = LightningModule.val_dataloader


class Recorder(Callback):
    """Counts the training batches that a Trainer really ran."""

    def __init__(self) -> None:
        self.num_batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.num_batches += 1


class EnoughError(Exception):
    """Ends a fit whose rest a test does not need."""


class StopAfterTraining(Callback):
    """Ends a fit before the callbacks that act at its end."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise EnoughError


def seeded(module_class: type[LightningModule] = Classifier, seed: int = 0, **arguments: Any) -> Any:
    """Return a module with weights drawn from a seed; what follows draws from that seed too."""
    torch.manual_seed(seed)
    return module_class(**arguments)


def make_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """Return a quiet Trainer on the CPU for one epoch, unless told otherwise."""
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), **(settings | options))


def fit(module: LightningModule, *callbacks: Callback, data: Any = None, **options: Any) -> Trainer:
    """Fit a module and return the Trainer."""
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(module, **({"datamodule": data} if data is not None else {}))
    return trainer


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Tell whether two state dicts are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def validate_by_hand(net: Any, loader: DataLoader, limit: int | None = None) -> dict[str, float]:
    """Return loss and accuracy of a callable over equal batches, in plain torch."""
    losses, hits, number = [], 0, 0
    with torch.no_grad():
        for x, y in itertools.islice(loader, limit):
            output = net(x)
            losses.append(F.cross_entropy(output, y).item())
            hits += int((output.argmax(1) == y).sum())
            number += len(y)
    return {"val_loss": sum(losses) / len(losses), "val_accuracy": hits / number}


def decibels(reference: Tensor, other: Tensor) -> float:
    """Return the ratio of signal to noise in decibels."""
    noise = (reference - other).double().square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise.clamp(min=1e-30)))


def activation_scales(model_path: Any) -> list[float]:
    """Return the scales of all quantized tensors of an ONNX file, in the order of execution."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(model_path).graph
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    return [float(values[node.input[1]]) for node in graph.node if node.op_type == "QuantizeLinear"]
