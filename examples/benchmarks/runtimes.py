"""One FashionMNIST CNN, trained once with quantization-aware training, as an artifact of every installed runtime.

`python examples/benchmarks/runtimes.py --epochs 2` prints accuracy on the 10,000 test images, latency and size. Each
runtime quantizes other places, so each gets the ranges of its own tensors from the same training images.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import FIT_IMAGES, classified_right, fashion_inputs, fashion_mnist
from fashion_mnist import fit
from results import publish
from timing import bootstrap_mean, interleaved, median_ms, table

import lightning_quant as lq
from lightning_quant import runtimes
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.errors import MissingRuntimeError
from lightning_quant.export.prepare import prepare

NUM_CALIBRATION, BATCH = 1024, 128
# ExecuTorch plans its memory for at most the captured batch.
CHUNK = 100


def installed() -> list[str]:
    """Return the runtimes that can be exported to here; those that cannot are said to be missing."""
    names = []
    for name in runtimes.names():
        try:
            runtimes.get(name, exporting=True)
            names.append(name)
        except MissingRuntimeError as error:
            print(error)
    return names


def main() -> None:
    """Train once, export to every runtime, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=51)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, _ = fashion_mnist("train")
    calibration = list(fashion_inputs(train[FIT_IMAGES][:NUM_CALIBRATION]).split(BATCH))
    images, labels = fashion_mnist("test")
    right, sizes, calls = {}, {}, {}
    one = fashion_inputs(images[:1])
    with tempfile.TemporaryDirectory() as name:
        callback = lq.QuantizationAwareTraining(module="net", output_dir=Path(name, "qat"))
        trained = fit(0, arguments.epochs, [callback]).net
        right["float weights after QAT"] = classified_right(trained, images, labels, fashion_inputs, CHUNK)
        calls["float weights after QAT"] = functools.partial(trained, one)
        for runtime in installed():
            right[f"{runtime}, simulated"] = _simulated(trained, runtime, calibration, images, labels)
            folder = Path(name, runtime)
            artifact = lq.quantize(trained, runtime=runtime, calibration_data=calibration, output_dir=folder, threads=1)
            sizes[runtime] = artifact.size_bytes
            model = lq.load(folder, threads=1)
            right[runtime] = classified_right(model, images, labels, fashion_inputs, CHUNK)
            calls[runtime] = functools.partial(model, one)
        with torch.no_grad():
            seconds = interleaved(calls, rounds=arguments.rounds, warmup=5, clock=time.perf_counter)
    rows = [_row(runtime, right, sizes, seconds) for runtime in calls]
    epochs = f"{arguments.epochs} epoch{'s' if arguments.epochs > 1 else ''}"
    title = f"FashionMNIST CNN, QAT of {epochs}, {len(labels)} test images"
    header = (title, "accuracy %", "artifact - simulated, points [95 %]", "ms, 1 image", "bytes")
    publish("runtimes", table(rows, header))


def _row(runtime: str, right: dict[str, Any], sizes: dict[str, int], seconds: dict[str, list[float]]) -> list[str]:
    accuracy = f"{100 * right[runtime].double().mean():.2f}"
    simulated = right.get(f"{runtime}, simulated")
    difference = ""
    if simulated is not None:
        difference = f"{bootstrap_mean(100 * (right[runtime].double() - simulated.double())):+.2f}"
    size = f"{sizes[runtime]:,}" if runtime in sizes else ""
    return [runtime, accuracy, difference, f"{median_ms(seconds[runtime]):.3f}", size]


def _simulated(
    net: torch.nn.Module, runtime: str, calibration: list[torch.Tensor], images: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    prepared = prepare(net, (calibration[0],), runtime=runtime, observer="mse")
    calibrate(prepared, steps_of(prepared, calibration))
    with prepared.attached("frozen"):
        predict: Callable[..., Any] = net
        return classified_right(predict, images, labels, fashion_inputs, CHUNK)


if __name__ == "__main__":
    main()
