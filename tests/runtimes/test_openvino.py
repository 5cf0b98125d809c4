"""OpenVINO's files and options."""

from pathlib import Path
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import torch
from residual_nets import IMAGE, residual_on
from torch import Tensor, nn

from lightning_quant import load
from lightning_quant.export.export import export
from lightning_quant.planned.layerwise import quantize_layers


def test_openvino_files_find_each_other_and_threads_are_passed_on(tmp_path: Path) -> None:
    artifact = export(residual_on("openvino"), tmp_path / "artifact")
    model: Any = load(artifact.path, threads=1)
    x: Tensor = IMAGE

    assert sorted(artifact.model_files.values()) == ["model.bin", "model.xml"]
    assert model.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert model.compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert torch.equal(model(x.double()), model(x))


def test_inputs_keep_their_names_where_the_first_operator_is_left_out(tmp_path: Path) -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 4)
            self.register_buffer("mean", torch.zeros(8))

        # A name as OpenVINO gives them.
        def forward(self, Parameter_7: Tensor) -> Tensor:  # noqa: N803
            return self.head(Parameter_7 - self.mean)

    model, x = Normalized().eval(), torch.randn(3, 8)
    layerwise = quantize_layers(model, (x,), recipe="int8_weight_only", runtime="openvino")
    artifact = export(layerwise, tmp_path / "artifact")
    with torch.no_grad():
        torch.testing.assert_close(load(artifact.path)(x), layerwise.quantized()(x), atol=1e-4, rtol=1e-4)
