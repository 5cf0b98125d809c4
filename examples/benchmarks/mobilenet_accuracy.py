"""Accuracy of a hard post-training case: a pretrained MobileNetV2 with a linear head on FashionMNIST.

`python examples/benchmarks/mobilenet_accuracy.py` calibrates every tool on the same 128 training images, three draws,
and scores all of them on the 10,000 test images. `--split validation` scores on training images that are held back.
"""

import argparse
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import (
    VALIDATION_IMAGES,
    calibration_indices,
    classified_right,
    fashion_mnist,
    mobilenet_inputs,
    mobilenet_probe,
)
from peers import nncf_quantize, ort_quantize_static, torch_ao_fx
from timing import bootstrap_mean, table
from torch import Tensor, nn

import lightning_quant as lq

OURS = "lightning_quant int8, ONNX Runtime"
NUM_CALIBRATION_IMAGES = 128


def tools(model: nn.Module, folder: Path) -> dict[str, Callable[[list[Tensor]], Callable[[Tensor], Tensor]]]:
    """Return, by name, functions from calibration batches `(32, 3, 96, 96)` to a quantized model."""

    def ours(calibration: list[Tensor]) -> nn.Module:
        artifact = lq.quantize(model, "int8", "onnxruntime", calibration_data=calibration, output_dir=folder / "ours")
        return lq.load(artifact.path, threads=torch.get_num_threads())

    builders: dict[str, Callable[[list[Tensor]], Callable[[Tensor], Tensor]]] = {
        "torch.ao FX, x86": lambda calibration: torch_ao_fx(model, calibration, "x86"),
        "torch.ao FX, onednn": lambda calibration: torch_ao_fx(model, calibration, "onednn"),
    }
    for method in ("MinMax", "Percentile"):
        builders[f"onnxruntime quantize_static, {method}"] = functools.partial(
            ort_quantize_static, model, path=folder / f"{method}.onnx", method=method
        )
    if importlib.util.find_spec("nncf"):
        builders["NNCF, OpenVINO"] = lambda calibration: nncf_quantize(model, calibration, folder / "nncf.onnx")
    return builders | {OURS: ours}


def main() -> None:
    """Quantize and score with every tool and draw, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--num-images", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train_images, train_labels = fashion_mnist("train")
    images, labels = train_images[VALIDATION_IMAGES], train_labels[VALIDATION_IMAGES]
    if arguments.split == "test":
        images, labels = fashion_mnist("test")
    images, labels = images[: arguments.num_images], labels[: arguments.num_images]
    model = mobilenet_probe()
    right: dict[str, list[Tensor]] = {"float": [classified_right(model, images, labels, mobilenet_inputs)]}
    with tempfile.TemporaryDirectory() as name:
        for tool, quantize in tools(model, Path(name)).items():
            for seed in arguments.seeds:
                chosen = calibration_indices(NUM_CALIBRATION_IMAGES, seed)
                quantized = quantize(list(mobilenet_inputs(train_images[chosen]).split(32)))
                right.setdefault(tool, []).append(classified_right(quantized, images, labels, mobilenet_inputs))
    means = {tool: torch.stack(answers).double().mean(0) for tool, answers in right.items()}
    rows = [
        (
            tool,
            f"{100 * means[tool].mean():.2f}",
            ", ".join(f"{100 * answer.double().mean():.2f}" for answer in answers),
            f"{bootstrap_mean(100 * (means[OURS] - means[tool])):+.2f}",
        )
        for tool, answers in right.items()
    ]
    title = f"MobileNetV2 probe, {len(labels)} {arguments.split} images"
    print(table(rows, (title, "accuracy %", "per calibration draw", "lightning_quant - this, points [95 %]")))


if __name__ == "__main__":
    main()
