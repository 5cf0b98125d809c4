"""FashionMNIST in four bits: post-training, trained through rounding, and beside LSQ as it was published.

`python examples/benchmarks/low_bits.py` trains every contestant from the same random weights for the same number of
epochs, on a part of the training images, with three seeds; rounding begins where the callback begins it. What keeps
eight bits is the same for all: the first and the last layer. The test images are read once, after the last run. With
`--split validation` the accuracy is that of training images that are held back, by which choices are made. What was
trained is kept in `--runs`: a benchmark that was cut off goes on from there.

Brevitas takes part where it is installed (`pip install --no-deps brevitas dependencies==2.0.1 unfoldNd`). torchao does
not: its quantization-aware training prepares Linear and Embedding, and refuses a convolution that it is given.
"""

import argparse
import functools
import importlib.util
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

BREVITAS = "Brevitas, W4A4, fake-quantized"
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
        self.register_buffer("has_begun", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """Call the layer with rounded input and weight."""
        layer: Any = self.layer
        if not self.has_begun:
            self.has_begun.fill_(True)
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


def with_brevitas(net: nn.Sequential) -> None:
    """Put layers of Brevitas into a network: scales per channel for weights, learned ones for what they read."""
    from brevitas import nn as quantized
    from brevitas import quant

    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for place, (name, layer) in enumerate(layers):
        bits = 8 if place in (0, len(layers) - 1) else 4
        read = quant.Int8ActPerTensorFloat if place == 0 else quant.Uint8ActPerTensorFloat
        options: dict[str, Any] = {"weight_quant": quant.Int8WeightPerChannelFloat, "weight_bit_width": bits}
        options |= {"input_quant": read, "input_bit_width": bits, "bias": layer.bias is not None}
        if isinstance(layer, nn.Linear):
            own = quantized.QuantLinear(layer.in_features, layer.out_features, **options)
        else:
            sizes = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
            own = quantized.QuantConv2d(*sizes, **options)
        # The very parameters, which the optimizer knows.
        own.weight, own.bias = layer.weight, layer.bias
        own.weight_quant.init_tensor_quant()
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, own.train())


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


def trained(
    recipe: str | dict[str, Any], options: dict[str, Any], folder: Path, seed: int, epochs: int, images: int
) -> nn.Module:
    """Train through rounding, unless that was done, and return the artifact."""
    path = folder / "artifact"
    if not (path / "manifest.json").exists():
        callback = lq.QuantizationAwareTraining(recipe, module="net", output_dir=path, threads=1, **options)
        fit(contestant(seed), seed, epochs, images, [callback])
    return lq.load(path, threads=1)


def post_training(recipe: str, folder: Path, *run: int) -> nn.Module:
    """Quantize the network of the float run."""
    path = folder / "artifact"
    if not (path / "manifest.json").exists():
        calls = list(fashion_inputs(fashion_mnist("train")[0][:512]).split(64))
        net = in_torch(FashionClassifier, folder, *run)
        lq.quantize(net, recipe, calibration_data=calls, output_dir=path, threads=1)
    return lq.load(path, threads=1)


def in_torch(kind: type[FashionClassifier], folder: Path, seed: int, *sizes: int) -> nn.Module:
    """Train a network that stays in PyTorch; the weights of one that was trained are read."""
    file = folder.parent / f"{kind.__name__}-{seed}.pt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(fit(contestant(seed, kind), seed, *sizes, []).net.state_dict(), file)
    net = contestant(seed, kind).net
    if issubclass(kind, LsqClassifier):
        kind.put_in(net)
    net.load_state_dict(torch.load(file))
    return net


def contestants() -> dict[str, Callable[..., nn.Module]]:
    """Return what gives a network of each kind for a folder, a seed, a number of epochs, and one of images."""
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


def main() -> None:
    """Train all, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=3_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--only", nargs="+", default=[], help="parts of names of the contestants beside float and LSQ")
    parser.add_argument("--runs", type=Path, default=Path("low_bits_runs"), help="folder of what was trained")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = (FLOAT, LSQ, *arguments.only) if arguments.only else ("",)
    chosen = {kind: run for kind, run in contestants().items() if any(part in kind for part in wanted)}
    nets: dict[str, list[nn.Module]] = {kind: [] for kind in chosen}
    for seed in arguments.seeds:
        for kind, run in chosen.items():
            name = f"{kind}-{seed}".replace(" ", "_").replace(",", "")
            nets[kind].append(run(arguments.runs / name, seed, arguments.epochs, arguments.images).eval())
            print(f"{kind}, seed {seed}: trained", flush=True)
    images, labels = fashion_mnist("train" if arguments.split == "validation" else "test")
    if arguments.split == "validation":
        images, labels = images[VALIDATION_IMAGES], labels[VALIDATION_IMAGES]
    right = {
        kind: [classified_right(net, images, labels, fashion_inputs) for net in of_seeds]
        for kind, of_seeds in nets.items()
    }
    number = f"{len(arguments.seeds)} seeds, {arguments.epochs} epochs of {arguments.images:,} images"
    text = summary(right, f"FashionMNIST, {number}, {len(labels):,} {arguments.split} images")
    if arguments.split == "test":
        publish("low_bits", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
