"""FashionMNIST in four bits: post-training, trained through rounding, and beside LSQ as it was published.

`python examples/benchmarks/low_bits.py` trains every contestant from the same weights for the same number of epochs, on
a part of the training images, with three seeds; rounding begins where the callback begins it. What keeps eight bits is
the same for all: the first and the last layer. The nets, by `--cases`:
- residual: a residual CNN from scratch;
- mobilenet: a pretrained MobileNetV2 with a linear head, both fine-tuned, on images of 64 x 64;
- resnet18: ResNet18's blocks at a quarter of its width, with a stem for images of 32 x 32, from scratch.

The test images are read once, after the last run. With `--split validation` the accuracy is that of training images
that are held back, by which choices are made. What was trained is kept in `--runs`: a benchmark that was cut off goes
on from there.

Brevitas takes part where it is installed (`pip install --no-deps brevitas dependencies==2.0.1 unfoldNd`). torchao does
not: its quantization-aware training prepares Linear and Embedding, and refuses a convolution that it is given.
"""

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from datasets import (
    VALIDATION_IMAGES,
    classified_right,
    fashion_inputs,
    fashion_mnist,
    mobilenet_inputs,
    mobilenet_probe,
)
from fashion_mnist import FashionClassifier
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from low_bits_peers import with_brevitas, with_lsq
from reference_models import fashion_cnn, small_resnet18
from results import publish
from timing import bootstrap_mean, table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq

BREVITAS = "Brevitas, W4A4, fake-quantized"
FLOAT, LSQ, OURS = "float", "LSQ, W4A4, fake-quantized", "lightning_quant int4, W4A4, trained"
W4A8_PTQ, W4A8 = "lightning_quant int4_weights, W4A8, post-training", "lightning_quant int4_weights, W4A8, trained"
PTQ = "lightning_quant int4, W4A4, post-training"
ROUNDING_FROM = 0.2


class Case(NamedTuple):
    """A network, what it reads, and how it is trained; learning rates are customary ones, which nothing chose."""

    net: Callable[[], nn.Module]
    to_inputs: Callable[[Tensor], Tensor]
    max_lr: float
    batch_size: int


def padded(images: Tensor) -> Tensor:
    """Normalize uint8 images `(N, 28, 28)` and add two pixels on every side: `(N, 1, 32, 32)`."""
    return F.pad(fashion_inputs(images), (2, 2, 2, 2), mode="replicate")


CASES = {
    "residual": Case(fashion_cnn, fashion_inputs, 0.1, 64),
    "mobilenet": Case(mobilenet_probe, functools.partial(mobilenet_inputs, size=64), 0.01, 32),
    "resnet18": Case(small_resnet18, padded, 0.05, 32),
}


class Run(NamedTuple):
    """One training of a contestant."""

    case: Case
    seed: int
    epochs: int
    images: int


class LsqClassifier(FashionClassifier):
    """The same training with learned steps from the batch on at which the callback begins to round."""

    put_in = staticmethod(with_lsq)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin to round; SGD moves the steps as it moves the weights."""
        done = self.trainer.fit_loop.epoch_loop.total_batch_idx
        total = int(self.trainer.estimated_stepping_batches)
        if done == int(ROUNDING_FROM * total):
            self.put_in(self.net)
            optimizer: Any = self.trainer.optimizers[0]
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            optimizer.param_groups[0]["params"] += [p for p in self.net.parameters() if id(p) not in known]


class BrevitasClassifier(LsqClassifier):
    """The same with layers of Brevitas."""

    put_in = staticmethod(with_brevitas)


def fit(run: Run, kind: type[FashionClassifier], callbacks: list[Callback]) -> Any:
    """Train on some of the first 50,000 training images, without validation."""
    seed_everything(run.seed, verbose=False)
    classifier: LightningModule = kind(run.case.max_lr, run.case.net)
    seed_everything(run.seed, verbose=False)
    pixels, labels = (values[: run.images] for values in fashion_mnist("train"))
    data = DataLoader(TensorDataset(run.case.to_inputs(pixels), labels), run.case.batch_size, shuffle=True)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(max_epochs=run.epochs, accelerator="cpu", callbacks=callbacks, **dict.fromkeys(quiet, False))
    trainer.fit(classifier.train(), data)
    return classifier.eval()


def trained(recipe: str | dict[str, Any], options: dict[str, Any], folder: Path, run: Run) -> nn.Module:
    """Train through rounding, unless that was done, and return the artifact."""
    path = folder / "artifact"
    if not (path / "manifest.json").exists():
        callback = lq.QuantizationAwareTraining(recipe, module="net", output_dir=path, threads=1, **options)
        fit(run, FashionClassifier, [callback])
    return lq.load(path, threads=1)


def post_training(recipe: str, folder: Path, run: Run) -> nn.Module:
    """Quantize the network of the float run."""
    path = folder / "artifact"
    if not (path / "manifest.json").exists():
        calls = list(run.case.to_inputs(fashion_mnist("train")[0][:128]).split(32))
        net = in_torch(FashionClassifier, folder, run)
        lq.quantize(net, recipe, calibration_data=calls, output_dir=path, threads=1)
    return lq.load(path, threads=1)


def in_torch(kind: type[FashionClassifier], folder: Path, run: Run) -> nn.Module:
    """Train a network that stays in PyTorch; the weights of one that was trained are read."""
    file = folder.parent / f"{kind.__name__}-{run.seed}.pt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(fit(run, kind, []).net.state_dict(), file)
    net = run.case.net()
    if issubclass(kind, LsqClassifier):
        kind.put_in(net)
    net.load_state_dict(torch.load(file))
    return net.eval()


def contestants() -> dict[str, Callable[..., nn.Module]]:
    """Return what gives a network of each kind for a folder and a run."""
    has_brevitas = importlib.util.find_spec("brevitas") is not None
    return {
        FLOAT: functools.partial(in_torch, FashionClassifier),
        LSQ: functools.partial(in_torch, LsqClassifier),
        OURS: functools.partial(trained, "int4", {}),
        **({BREVITAS: functools.partial(in_torch, BrevitasClassifier)} if has_brevitas else {}),
        W4A8_PTQ: functools.partial(post_training, "int4_weights"),
        W4A8: functools.partial(trained, "int4_weights", {}),
        PTQ: functools.partial(post_training, "int4"),
        "int4, trained with distillation": functools.partial(trained, "int4", {"distill": 0.5}),
        "int4, trained with damping": functools.partial(trained, {"name": "int4", "damping": 0.01}, {}),
        "int4, trained with annealed bits": functools.partial(
            trained, "int4", {"schedule": {"anneal_bits_until": 0.5}}
        ),
    }


def summary(right: Mapping[str, list[Tensor]], title: str) -> str:
    """Return the table; intervals are over the images alone, and seeds have their differences beside."""
    means = {kind: torch.stack(answers).double().mean(0) for kind, answers in right.items()}

    def against(kind: str, other: str) -> str:
        return f"{bootstrap_mean(100 * (means[kind] - means[other])):+.2f}"

    def by_seed(kind: str) -> str:
        pairs = zip(right[kind], right[LSQ], strict=True)
        return ", ".join(f"{100 * (one.double() - other.double()).mean():+.2f}" for one, other in pairs)

    rows = [
        (
            kind,
            f"{100 * means[kind].mean():.2f}",
            ", ".join(f"{100 * answer.double().mean():.2f}" for answer in answers),
            against(kind, FLOAT),
            against(kind, LSQ),
            by_seed(kind),
        )
        for kind, answers in right.items()
    ]
    header = (title, "accuracy %", "per seed", "this - float [95 %]", "this - LSQ", "the same, per seed")
    return table(rows, header)


def recovered(right: Mapping[str, list[Tensor]]) -> str:
    """Return which share of what post-training quantization lost training through rounding wins back.

    None is told where the interval of what was lost holds zero.
    """
    rows = []
    for bits, (before, after) in {"W4A8": (W4A8_PTQ, W4A8), "W4A4": (PTQ, OURS)}.items():
        if before in right and after in right:
            means = [torch.stack(right[kind]).double().mean(0) for kind in (FLOAT, before, after)]
            lost, regained = 100 * (means[0] - means[1]), 100 * (means[2] - means[1])
            interval = bootstrap_mean(lost)
            # A share of what may be nothing says nothing.
            share = f"{100 * regained.mean() / lost.mean():.0f} %" if interval.low > 0 else "-"
            rows.append((bits, f"{interval:.2f}", f"{bootstrap_mean(regained):.2f}", share))
    return table(rows, ("", "post-training loses, points", "training regains, points", "share")) if rows else ""


def measured(name: str, arguments: argparse.Namespace) -> None:
    """Train all contestants of one case, and print its tables."""
    case, size = CASES[name], (arguments.epochs, arguments.images)
    wanted = (FLOAT, LSQ, *arguments.only) if arguments.only else ("",)
    chosen = {kind: make for kind, make in contestants().items() if any(part in kind for part in wanted)}
    nets: dict[str, list[nn.Module]] = {kind: [] for kind in chosen}
    for seed in arguments.seeds:
        for kind, make in chosen.items():
            folder = arguments.runs / name / f"{kind}-{seed}".replace(" ", "_").replace(",", "")
            nets[kind].append(make(folder, Run(case, seed, *size)).eval())
            print(f"{name}, {kind}, seed {seed}: done after {time.process_time():.0f} s", flush=True)
    images, labels = fashion_mnist("train" if arguments.split == "validation" else "test")
    if arguments.split == "validation":
        images, labels = images[VALIDATION_IMAGES], labels[VALIDATION_IMAGES]
    images, labels = images[: arguments.num_samples], labels[: arguments.num_samples]
    right = {
        kind: [classified_right(net, images, labels, case.to_inputs) for net in of_seeds]
        for kind, of_seeds in nets.items()
    }
    number = f"{len(arguments.seeds)} seeds, {arguments.epochs} epochs of {arguments.images:,} images"
    text = summary(right, f"{name}, {number}, {len(labels):,} {arguments.split} images")
    if arguments.split == "test":
        publish("low_bits" if name == "residual" else f"low_bits-{name}", *filter(None, (text, recovered(right))))
    else:
        print(text, recovered(right), sep="\n\n")


def main() -> None:
    """Train the chosen networks, and print the tables of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=["residual"], choices=CASES)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=3_000)
    parser.add_argument("--num-samples", type=int, default=10_000, help="of the split, to score on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--only", nargs="+", default=[], help="parts of names of the contestants beside float and LSQ")
    parser.add_argument("--runs", type=Path, default=Path("low_bits_runs"), help="folder of what was trained")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.cases:
        measured(name, arguments)


if __name__ == "__main__":
    main()
