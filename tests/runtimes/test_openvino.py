"""OpenVINO's files and options."""

from pathlib import Path
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import torch
from residual_nets import IMAGE, residual_on
from torch import Tensor

from lightning_quant import load
from lightning_quant.export.export import export


def test_openvino_files_find_each_other_and_threads_are_passed_on(tmp_path: Path) -> None:
    artifact = export(residual_on("openvino"), tmp_path / "artifact")
    model: Any = load(artifact.path, threads=1)
    x: Tensor = IMAGE

    assert sorted(artifact.model_files.values()) == ["model.bin", "model.xml"]
    assert model.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert model.compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert torch.equal(model(x.double()), model(x))
