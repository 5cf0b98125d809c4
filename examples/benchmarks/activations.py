"""What an activation between convolutions costs on each runtime, in time and in noise.

`python examples/benchmarks/activations.py` quantizes three convolutions of 64 channels on 32x32 with two activations
between them, for each runtime that is installed, and times the artifacts in interleaved rounds beside ReLU's, CPU time,
one image, one thread. The operators that ran for it tell whether it was computed in integers, in a convolution's own
kernel, or between two roundings.
"""

import argparse
import functools
import tempfile
from pathlib import Path

import torch
from results import publish
from timing import interleaved, median_ms, table
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant import runtimes
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.errors import QuantizationError
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise


class Gated(nn.Module):
    """SiLU, written out."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x * sigmoid(x)`."""
        return x * torch.sigmoid(x)


LAYERS = {
    "ReLU": nn.ReLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "PReLU": nn.PReLU,
    "Sigmoid": nn.Sigmoid,
    "SiLU": nn.SiLU,
    "x * sigmoid(x)": Gated,
    "Hardsigmoid": nn.Hardsigmoid,
    "Hardswish": nn.Hardswish,
    "GELU": nn.GELU,
    "Mish": nn.Mish,
    "Softmax over channels": lambda: nn.Softmax(1),
    "InstanceNorm": lambda: nn.InstanceNorm2d(64, affine=True),
    "GroupNorm": lambda: nn.GroupNorm(8, 64),
}
_WITHOUT = ("Convolution", "QLinearConv", "QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Reorder")


def build(name: str, runtime: str, folder: Path) -> tuple[lq.Artifact, nn.Module]:
    """Return an artifact with that layer between its convolutions, and the float module."""
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(64, 64, 3, padding=1), LAYERS[name]())][:-1]
    model = nn.Sequential(*layers).eval()
    calls = [torch.randn(2, 64, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    prepared = prepare(model, (calls[0],), runtime=runtime, observer="mse", trains=False)
    calibrate(prepared, steps_of(prepared, calls))
    return export(prepared, folder), model


def rows(runtime: str, rounds: int) -> list[tuple[str, ...]]:
    """Return a row for each layer."""
    found, calls = [], {}
    image = torch.randn(1, 64, 32, 32, generator=torch.Generator().manual_seed(9))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for index, name in enumerate(LAYERS):
            try:
                artifact, model = build(name, runtime, Path(folder, str(index)))
            except QuantizationError as error:
                found.append((name, "", f"refused: {error}"[:80]))
                continue
            loaded = lq.load(artifact.path, threads=1)
            calls[name] = functools.partial(loaded, image)
            counts = runtimes.get(runtime).count_operators(artifact.model_path)
            ran = ", ".join(kind for kind in counts if not kind.startswith(_WITHOUT))
            found.append((name, f"{signal_to_noise(model(image), loaded(image)):.1f}", ran))
        ms = {name: median_ms(seconds) for name, seconds in interleaved(calls, rounds=rounds).items()}
    return [
        (name, f"{ms[name]:.2f}" if name in ms else "", f"{ms[name] / ms['ReLU']:.2f}" if name in ms else "", *rest)
        for name, *rest in found
    ]


def main() -> None:
    """Print one table for each runtime."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtimes", nargs="+", default=runtimes.names(), choices=runtimes.names())
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for runtime in arguments.runtimes:
        header = (f"layer, {runtime}", "median CPU ms", "/ ReLU", "dB", "operators beside convolutions")
        publish(f"activations-{runtime}", table(rows(runtime, arguments.rounds), header))


if __name__ == "__main__":
    main()
