"""FashionMNIST from scratch: float, the float run's post-training artifact, and the QAT run's artifact.

`python examples/benchmarks/fashion_mnist.py --epochs 4 --seeds 0 1 2` trains each seed twice with the same number of
epochs, without and with quantization-aware training. The test images are read once, after the last run.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from datasets import FIT_IMAGES, VALIDATION_IMAGES, classified_right, fashion_inputs, fashion_mnist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from reference_models import fashion_cnn
from results import publish
from timing import bootstrap_mean, table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq

FLOAT, PTQ, QAT = "float", "post-training", "quantization-aware training"


class FashionClassifier(LightningModule):
    """Plain training of a network: SGD with one learning-rate cycle."""

    def __init__(self, max_lr: float = 0.1, make_net: Callable[[], nn.Module] = fashion_cnn) -> None:
        super().__init__()
        self.net = make_net()
        self.max_lr = max_lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of `net` on one batch."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy of `net` on one batch."""
        images, labels = batch
        self.log("val_acc", (self.net(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD and a cycle over all steps of the run."""
        optimizer = torch.optim.SGD(self.parameters(), self.max_lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.max_lr, total_steps=steps, pct_start=0.25)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def fit(seed: int, epochs: int, callbacks: list[Callback]) -> FashionClassifier:
    """Train on the first 50,000 training images and validate on the other 10,000; the callbacks make the artifact."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # the table is the output
    seed_everything(seed, verbose=False)
    images, labels = fashion_mnist("train")
    train, validation = (
        DataLoader(TensorDataset(fashion_inputs(images[part]), labels[part]), size, shuffle=part is FIT_IMAGES)
        for part, size in ((FIT_IMAGES, 64), (VALIDATION_IMAGES, 500))
    )
    classifier = FashionClassifier()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, train, validation)
    return classifier.eval()


def ptq_of(recipe: str, folder: Path) -> lq.PostTrainingQuantization:
    """Return the callback that makes the post-training artifact."""
    return lq.PostTrainingQuantization(recipe, module="net", output_dir=folder, threads=1)


def qat_of(recipe: str, folder: Path) -> lq.QuantizationAwareTraining:
    """Return the callback that makes the artifact trained through rounding."""
    return lq.QuantizationAwareTraining(recipe, module="net", output_dir=folder, threads=1)


def main() -> None:
    """Train every seed twice and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="int8")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    right: dict[str, list[Tensor]] = {FLOAT: [], PTQ: [], QAT: []}
    with tempfile.TemporaryDirectory() as name:
        runs = []
        for seed in arguments.seeds:
            ptq, qat = Path(name, f"ptq-{seed}"), Path(name, f"qat-{seed}")
            float_net = fit(seed, arguments.epochs, [ptq_of(arguments.recipe, ptq)]).net
            fit(seed, arguments.epochs, [qat_of(arguments.recipe, qat)])
            runs.append({FLOAT: float_net, PTQ: lq.load(ptq, threads=1), QAT: lq.load(qat, threads=1)})
        images, labels = fashion_mnist("test")
        for run in runs:
            for kind, net in run.items():
                right[kind].append(classified_right(net, images, labels, fashion_inputs))
    means = {kind: torch.stack(answers).double().mean(0) for kind, answers in right.items()}
    rows = [
        (
            kind,
            f"{100 * means[kind].mean():.2f}",
            ", ".join(f"{100 * answer.double().mean():.2f}" for answer in answers),
            f"{bootstrap_mean(100 * (means[kind] - means[FLOAT])):+.2f}",
        )
        for kind, answers in right.items()
    ]
    title = f"FashionMNIST, {arguments.recipe}, {arguments.epochs} epochs, {len(labels)} test images"
    header = (title, "accuracy %", "per seed", "this - float, points [95 %]")
    publish(f"fashion_mnist-{arguments.recipe}", table(rows, header))


if __name__ == "__main__":
    main()
