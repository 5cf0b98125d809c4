"""3-D convolutions run in integers where the runtime has them, and as the simulation computes them."""

from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_quant as lq


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.ConstantPad3d(1, 0.0),
        nn.Conv3d(2, 6, 3),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.Conv3d(6, 6, 3, stride=2, padding=1, groups=3),
        nn.Flatten(),
        nn.Linear(6 * 2 * 3 * 3, 3),
    ).eval()


@pytest.mark.parametrize(("runtime", "kernel"), [("onnxruntime", "QLinearConv"), ("openvino", "Convolution_I8")])
def test_convolutions_of_volumes_are_integer(runtime: str, kernel: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    calls = [torch.randn(3, 2, 4, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    artifact = lq.quantize(net(), "int8", runtime, calibration_data=calls, output_dir=tmp_path, threads=1)

    assert artifact.plan["coverage"] == 1.0
    assert artifact.report["operators"][kernel] == 2
    assert artifact.report["still_float"] == {}
    assert artifact.report["parity"]["worst_share"] == 1.0
