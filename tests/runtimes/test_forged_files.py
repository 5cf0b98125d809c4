"""No model file, however it is made, does more than give a model or an error of ours.

Runtimes whose files are native code (`inductor`, `executorch`) promise nothing of the kind, which the README says.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forged_run
import pytest
import torch
from layer_models import TokenClassifier, tokens
from models import with_statistics
from torch import nn

from lightning_quant.artifact.artifact import Artifact, add_report
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.signature import Signature
from lightning_quant.errors import ArtifactError
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.runtimes import openvino

IMAGE = torch.randn(4, 3, 8, 8)
KINDS = ("onnxruntime", "onnxruntime-layers", "openvino", "torch", "torch-layers")


def artifact(kind: str, folder: Path) -> Artifact:
    runtime, _, layers = kind.partition("-")
    torch.manual_seed(0)
    if layers:
        model: nn.Module = TokenClassifier(tied=True).eval()
        quantized: Any = quantize_layers(model, (tokens(),), recipe="int8_dynamic", runtime=runtime)
    else:
        parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4)]
        model = with_statistics(nn.Sequential(*parts)).eval()
        quantized = prepare(model, (IMAGE,), recipe="int8", runtime=runtime, observer="min_max")
        calibrate(quantized, steps_of(quantized, [IMAGE]))
    return export(quantized, folder)


REPORT: dict[str, Any] = {
    "warnings": ["parity FAILED: for a reason"],
    "size_ratio": 0.3,
    "threads": 1,
    "cpu": "one",
    "metrics": [{"name": "x", "float_value": 0.5, "artifact": 0.4, "before": 0.6, "higher_is_better": True}],
    "scalars": {"quant/speedup/batch_1": 2.0, "quant/parity_failed": 1.0},
    "latency": [{"batch": 1, "torch_float": {"median_ms": 1.0}, "runtime_float": None}],
}


def check(kind: str, number: int, folder: Path, what: str = "files") -> None:
    made = artifact(kind, folder / "artifact")
    forged_run.prepare_folder(add_report(made, REPORT, "# A report"), folder)
    command = [sys.executable, forged_run.__file__, str(folder), str(number), what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]

    assert "done" in lines[-1], f"ended with {ran.returncode} after {lines[-1]}: {ran.stderr[-2000:]}"
    assert not [line for line in lines if "wrong" in line]
    (growth,) = [line["growth"] for line in lines if "growth" in line]
    assert growth < forged_run.MAX_GROWTH_BYTES


@pytest.mark.parametrize("kind", KINDS)
def test_some_forged_files(kind: str, tmp_path: Path) -> None:
    check(kind, 12, tmp_path)


def test_openvino_complains_in_bytes_that_are_no_text(tmp_path: Path) -> None:
    written = artifact("openvino", tmp_path / "artifact")
    signature = Signature.from_dict(written.manifest["signature"])
    forged_run.prepare_folder(written, tmp_path)
    (model,) = (tmp_path / "whole").glob("*.xml")
    model.write_bytes(model.read_bytes().replace(b'version="opset1"', b'version="opset\xf7"'))

    with pytest.raises(ArtifactError, match="to be a model for OpenVINO"):
        openvino.RUNTIME.load(tmp_path / "whole", json.loads((tmp_path / "about.json").read_text())["files"], signature)


@pytest.mark.parametrize("kind", ["onnxruntime", "torch-layers"])
def test_some_forged_manifests_and_golden_batches(kind: str, tmp_path: Path) -> None:
    check(kind, 8, tmp_path, "folder")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_many_forged_manifests_and_golden_batches(kind: str, tmp_path: Path) -> None:
    check(kind, 500, tmp_path, "folder")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_many_forged_files(kind: str, tmp_path: Path) -> None:
    check(kind, 500, tmp_path)
