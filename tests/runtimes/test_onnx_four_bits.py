"""Weights of few bits take half a byte in a file, and run in the same integer kernels."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import lightning_quant as lq
from lightning_quant import runtimes

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_four_bits_are_stored_in_four_and_computed_in_eight(tmp_path: Path, runtime: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    )
    data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    recipe = {"name": "int4_weights", "accuracy_steps": [], "wide_ends": False}
    artifact = lq.quantize(net, recipe, runtime, calibration_data=data, output_dir=tmp_path / "a", threads=1)

    parity = artifact.report["parity"]
    assert float(parity["artifact_db"]) > 100
    assert artifact.report["still_float"] == {}
    stored = sum(layer.weight.numel() for layer in (net[0], net[2], net[5])) / 2
    if runtime == "openvino":
        assert stored < artifact.model_path.with_suffix(".bin").stat().st_size < 1.4 * stored
        return
    model = onnx.load(artifact.model_path)
    kinds = [constant.data_type for constant in model.graph.initializer if len(constant.dims) > 1]
    assert kinds == [onnx.TensorProto.INT4] * 3
    counts = runtimes.get(runtime).count_operators(artifact.model_path)
    assert counts["QLinearConv"] == 2
    assert "Cast" not in counts
