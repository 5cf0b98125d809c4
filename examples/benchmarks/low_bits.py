"""FashionMNIST in four bits: post-training, trained through rounding, and beside LSQ as it was published.

`python examples/benchmarks/low_bits.py` trains every contestant from the same random weights for the same number of
epochs, on a part of the training images, with three seeds; rounding begins where the callback begins it. What keeps
eight bits is the same for all: the first and the last layer. The test images are read once, after the last run. With
`--split validation` the accuracy is that of training images that are held back, by which choices are made.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from datasets import VALIDATION_IMAGES, classified_right, fashion_inputs, fashion_mnist
from fashion_mnist import FashionClassifier
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from results import publish
from timing import bootstrap_mean, table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq

FLOAT, LSQ, OURS = "float", "LSQ, W4A4, fake-quantized", "lightning_quant int4, W4A4, trained"
W4A8_PTQ, W4A8 = "lightning_quant int4_weights, W4A8, post-training", "lightning_quant int4_weights, W4A8, trained"
PTQ = "lightning_quant int4, W4A4, post-training"
ROUNDING_FROM = 0.2


class Step(torch.autograd.Function):
    """Equations 1 to 3 of Esser et al. 2020, arXiv:1902.08153."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        """Round to multiples of a step."""
        ctx.save_for_backward(x, step)
        ctx.ends = low, high
        return (x / step).round().clamp(low, high) * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Pass the gradient where nothing is clipped."""
        (x, step), (low, high) = ctx.saved_tensors, ctx.ends
        ratio = x / step
        inside = (ratio > low) & (ratio < high)
        slope = torch.where(inside, ratio.round() - ratio, ratio.clamp(low, high))
        return grad * inside, (grad * slope).sum(), None, None


class LsqLayer(nn.Module):
    """A layer with a learned step for its weight and one for what it reads; both are moved by the user's optimizer."""

    def __init__(self, layer: nn.Module, bits: int, *, signed: bool) -> None:
        super().__init__()
        self.layer = layer
        self.weight_ends = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.input_ends = self.weight_ends if signed else (0, 2**bits - 1)
        weight: Any = layer.weight
        self.weight_step = nn.Parameter(_first_step(weight.detach(), self.weight_ends[1]))
        self.input_step = nn.Parameter(torch.ones(()))
        self.has_begun = False

    def forward(self, x: Tensor) -> Tensor:
        """Call the layer with rounded input and weight."""
        layer: Any = self.layer
        if not self.has_begun:
            self.has_begun = True
            self.input_step.data.copy_(_first_step(x.detach(), self.input_ends[1]))
        x = _rounded(x, self.input_step, self.input_ends)
        weight = _rounded(layer.weight, self.weight_step, self.weight_ends)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return layer._conv_forward(x, weight, layer.bias)


def _first_step(x: Tensor, high: int) -> Tensor:
    return 2 * x.abs().mean() / high**0.5


def _rounded(x: Tensor, step: Tensor, ends: tuple[int, int]) -> Tensor:
    """Scale the gradient of the step as section 2.2 says."""
    scale = (x.numel() * ends[1]) ** -0.5
    return Step.apply(x, step * scale + (step - step * scale).detach(), *ends)


def with_lsq(net: nn.Sequential) -> None:
    """Put learned steps into a network: four bits, eight in the first and the last layer."""
    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for place, (name, layer) in enumerate(layers):
        is_end = place in (0, len(layers) - 1)
        parent, _, own = name.rpartition(".")
        setattr(net.get_submodule(parent), own, LsqLayer(layer, 8 if is_end else 4, signed=place == 0))


class LsqClassifier(FashionClassifier):
    """The same training with learned steps from the batch on at which the callback begins to round."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin to round; SGD moves the steps as it moves the weights."""
        done = self.trainer.fit_loop.epoch_loop.total_batch_idx
        total = int(self.trainer.estimated_stepping_batches)
        if done == int(ROUNDING_FROM * total):
            with_lsq(self.net)
            optimizer: Any = self.trainer.optimizers[0]
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            optimizer.param_groups[0]["params"] += [p for p in self.net.parameters() if id(p) not in known]


def fit(classifier: LightningModule, seed: int, epochs: int, images: int, callbacks: list[Callback]) -> Any:
    """Train on some of the first 50,000 training images, without validation."""
    seed_everything(seed, verbose=False)
    pixels, labels = (values[:images] for values in fashion_mnist("train"))
    data = DataLoader(TensorDataset(fashion_inputs(pixels), labels), 64, shuffle=True)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **dict.fromkeys(quiet, False))
    trainer.fit(classifier, data)
    return classifier.eval()


def contestant(seed: int, kind: type[FashionClassifier] = FashionClassifier) -> FashionClassifier:
    """Return a network with the random weights of a seed."""
    seed_everything(seed, verbose=False)
    return kind()


def trained(folder: Path, recipe: str | dict[str, Any], **options: Any) -> Callable[[int, int, int], nn.Module]:
    """Return what trains through rounding and gives the artifact."""

    def run(seed: int, epochs: int, images: int) -> nn.Module:
        path = folder / f"{abs(hash(str((recipe, options, seed))))}"
        callback = lq.QuantizationAwareTraining(recipe, module="net", output_dir=path, threads=1, **options)
        fit(contestant(seed), seed, epochs, images, [callback])
        return lq.load(path, threads=1)

    return run


def post_training(folder: Path, recipe: str, nets: Mapping[int, nn.Module], seed: int, *_: int) -> nn.Module:
    """Quantize the network of the float run."""
    calls = list(fashion_inputs(fashion_mnist("train")[0][:512]).split(64))
    artifact = lq.quantize(
        nets[seed], recipe, calibration_data=calls, output_dir=folder / f"{recipe}-{seed}", threads=1
    )
    return lq.load(artifact.path, threads=1)


def contestants(folder: Path) -> dict[str, Callable[[int, int, int], nn.Module]]:
    """Return what gives a network of each kind for a seed, a number of epochs, and one of images."""
    nets: dict[int, nn.Module] = {}

    def in_float(seed: int, epochs: int, images: int) -> nn.Module:
        return nets.setdefault(seed, fit(contestant(seed), seed, epochs, images, []).net)

    def lsq(seed: int, epochs: int, images: int) -> nn.Module:
        return fit(contestant(seed, LsqClassifier), seed, epochs, images, []).net

    return {
        FLOAT: in_float,
        W4A8_PTQ: functools.partial(post_training, folder, "int4_weights", nets),
        W4A8: trained(folder, "int4_weights"),
        PTQ: functools.partial(post_training, folder, "int4", nets),
        LSQ: lsq,
        OURS: trained(folder, "int4"),
        "the same with distillation": trained(folder, "int4", distill=0.5),
        "the same with damping": trained(folder, {"name": "int4", "damping": 0.01}),
        "the same without learned ranges": trained(folder, {"name": "int4", "learned_ranges": False}),
    }


def summary(right: Mapping[str, list[Tensor]], title: str) -> str:
    """Return the table, differences paired by sample."""
    means = {kind: torch.stack(answers).double().mean(0) for kind, answers in right.items()}

    def against(kind: str, other: str) -> str:
        return f"{bootstrap_mean(100 * (means[kind] - means[other])):+.2f}" if other in means else ""

    rows = [
        (
            kind,
            f"{100 * means[kind].mean():.2f}",
            ", ".join(f"{100 * answer.double().mean():.2f}" for answer in answers),
            *(against(kind, other) for other in (FLOAT, LSQ, OURS)),
        )
        for kind, answers in right.items()
    ]
    return table(rows, (title, "accuracy %", "per seed", "this - float [95 %]", "this - LSQ", "this - int4, trained"))


def main() -> None:
    """Train all, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=3_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--only", nargs="+", default=[], help="parts of names of the contestants to run beside float")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, list[nn.Module]] = {}
    with tempfile.TemporaryDirectory() as name:
        for kind, run in contestants(Path(name)).items():
            if kind == FLOAT or not arguments.only or any(part in kind for part in arguments.only):
                runs[kind] = [run(seed, arguments.epochs, arguments.images) for seed in arguments.seeds]
        images, labels = fashion_mnist("train" if arguments.split == "validation" else "test")
        if arguments.split == "validation":
            images, labels = images[VALIDATION_IMAGES], labels[VALIDATION_IMAGES]
        right = {
            kind: [classified_right(net, images, labels, fashion_inputs) for net in nets] for kind, nets in runs.items()
        }
    number = f"{len(arguments.seeds)} seeds, {arguments.epochs} epochs of {arguments.images:,} images"
    text = summary(right, f"FashionMNIST, {number}, {len(labels):,} {arguments.split} images")
    if arguments.split == "test" and not arguments.only:
        publish("low_bits", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
