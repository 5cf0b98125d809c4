"""OpenVINO computes activations inside its integer convolutions: nothing is rounded between the two."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_quant import runtimes
from lightning_quant.artifact import artifact as artifacts
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.simulate.parity import check_parity
from lightning_quant.simulate.prepared import Prepared


class Gated(nn.Module):
    """`x * sigmoid(x)`, written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "SiLU": nn.SiLU,
    "SiLU written out": Gated,
    "Hardswish": nn.Hardswish,
    "GELU": nn.GELU,
    "PReLU": nn.PReLU,
    "LeakyReLU": nn.LeakyReLU,
    "Tanh": nn.Tanh,
}


def calibrated(activation: Callable[[], nn.Module]) -> tuple[Prepared, Tensor]:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16)]
    layers = [layer for conv in convolutions for layer in (conv, activation())][:-1]
    x = torch.randn(4, 3, 16, 16)
    prepared = prepare(nn.Sequential(*layers).eval(), (x,), runtime="openvino")
    calibrate(prepared, steps_of(prepared, [x]))
    return prepared, x


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_part_of_the_convolution(name: str, tmp_path: Path) -> None:
    prepared, x = calibrated(ACTIVATIONS[name])
    artifact = export(prepared, tmp_path)
    counts = runtimes.get("openvino").count_operators(artifact.model_path)
    loaded = artifacts.load(artifact.path, threads=1)

    assert counts["Convolution_I8"] == 3
    assert not {"Eltwise", "Eltwise_I8", "Convert_I8"} & counts.keys()
    assert check_parity(prepared, loaded, runtimes.get("openvino"), artifact.model_path, [x]).failures == []


def test_chunks_of_a_convolution_are_joined_in_integers(tmp_path: Path) -> None:
    class Chunked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(24, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.first(x).chunk(2, 1)
            return self.last(torch.cat([one, two, self.inner(two)], 1))

    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    prepared = prepare(Chunked().eval(), (x,), runtime="openvino")

    assert [row.action for row in prepared.plan.rows if row.kind == "cat"] == ["int8"]
