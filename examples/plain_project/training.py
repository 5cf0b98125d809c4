"""A LightningModule and its data, trained as always: nothing here imports a quantization package."""

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(LightningModule):
    """A small CNN for 8x8 digits."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(16 * width, 10)),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log accuracy."""
        self.log("val_accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train with Adam."""
        return torch.optim.Adam(self.parameters(), 2e-3)


class Data(LightningDataModule):
    """Digits: 1,397 to train on, 400 to validate on."""

    def setup(self, stage: str) -> None:
        """Split in the order of the data set."""
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target)
        self.training = TensorDataset(images[400:], labels[400:])
        self.held_out = TensorDataset(images[:400], labels[:400])

    def train_dataloader(self) -> DataLoader:
        """Shuffle."""
        return DataLoader(self.training, 32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Return the held-out digits in order."""
        return DataLoader(self.held_out, 100)
