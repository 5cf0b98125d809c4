"""Runtimes move integers where values are only moved: nothing is dequantized between the first layer and the last."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import with_statistics
from torch import Tensor, nn

import lightning_quant as lq


class Neck(nn.Module):
    """Parts, borders and upsampling between convolutions, and a BatchNorm that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1, padding_mode="reflect"), nn.Conv2d(8, 8, 3, 2, 1)
        self.norm = FunctionalNorm(8)
        self.inner, self.join = nn.Conv2d(4, 4, 3), nn.Conv2d(16, 8, 1)
        self.last = nn.Conv2d(8, 6, 3, 1, 1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        low = F.interpolate(F.relu(self.down(x)), x.shape[2:])
        left, right = x.chunk(2, 1)
        right = F.relu(self.inner(F.pad(right, (1, 1, 1, 1), mode="replicate")))
        return self.last(torch.roll(F.relu(self.join(torch.cat([low, left.flip(3), right], 1))), 1, 2))


class FunctionalNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


# What each runtime dequantizes with, and how often: at the end. PyTorch has no kernel for two of the borders and roll.
DEQUANTIZES = {
    "onnxruntime": ("DequantizeLinear", 1),
    # It counts what it pads in float.
    "openvino": ("Pad", 0),
    "torch": ("aten.dequantize.self", 4),
}


@pytest.mark.parametrize("runtime", DEQUANTIZES)
def test_integers_are_moved(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    torch.manual_seed(0)
    calls = [torch.randn(3, 3, 16, 16) for _ in range(3)]
    model = with_statistics(Neck())
    artifact = lq.quantize(model, "int8", runtime, calibration_data=calls, output_dir=tmp_path, threads=1)

    assert artifact.plan["coverage"] == 1.0
    assert artifact.report["still_float"] == {}
    assert artifact.report["parity"]["worst_share"] == 1.0
    operator, number = DEQUANTIZES[runtime]
    counts = artifact.report["operators"]
    assert counts.get(operator, 0) == number


class Apart(nn.Module):
    """A ReLU that is in no graph, behind a layer that is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean = x.mean()
        return F.relu(self.layer(x)) + mean


def test_an_integer_product_is_none_of_a_relus_float_kernel(tmp_path: Path) -> None:
    artifact = lq.quantize(Apart(), "int8", calibration_data=[torch.randn(4, 8)], output_dir=tmp_path, threads=1)

    assert artifact.report["still_float"] == {}
    assert artifact.report["operators"]["QGemm"] == 1


class Returned(nn.Module):
    """What integers read behind a transposition is a result, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(16), nn.Conv1d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states = self.norm(x)
        return self.head(states.transpose(1, 2)), states


def test_results_are_not_rounded_for_what_reads_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Returned().eval(), [torch.randn(4, 12, 16) for _ in range(2)]
    artifact = lq.quantize(model, calibration_data=data, output_dir=tmp_path, threads=1)
    with torch.no_grad():
        exact = model(data[0])[1]
    torch.testing.assert_close(lq.load(artifact.path)(data[0])[1], exact)
    assert artifact.report["operators"]["QLinearConv"] == 1
