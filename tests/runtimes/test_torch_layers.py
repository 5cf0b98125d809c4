"""Quantized layers in process: a program without tensors, and the tensors beside it."""

from pathlib import Path

import pytest
import torch
from linear_nets import net

from lightning_quant import runtimes
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.errors import ArtifactError
from lightning_quant.export.export import export
from lightning_quant.planned.layerwise import quantize_layers

X = torch.randn(3, 6)
RUNTIME = runtimes.get("torch")


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    torch.manual_seed(0)
    return export(quantize_layers(net(), (X,), recipe="int8_weight_only", runtime="torch"), tmp_path / "artifact")


def test_every_tensor_is_in_the_file_of_tensors_once_and_none_in_the_program(artifact: Artifact) -> None:
    loaded = RUNTIME.load(artifact.path, artifact.model_files, artifact.signature, threads=1)

    assert sorted(Path(name).suffix for name in artifact.model_files.values()) == [".gz", ".safetensors"]
    # 6 * 8 + 8 * 4 bytes of weights, scales and biases of 12 rows in float32, and the file's own head.
    assert 80 + 2 * 12 * 4 < artifact.model_path.stat().st_size < 80 + 2 * 12 * 4 + 2000
    assert loaded(X).shape == (3, 4)
    assert RUNTIME.count_operators(artifact.model_path)["lightning_quant.linear_weight_only.default"] == 2


def test_a_folder_without_a_program_is_refused(artifact: Artifact) -> None:
    files = {role: name for role, name in artifact.model_files.items() if not name.endswith(".gz")}
    with pytest.raises(ArtifactError, match="program"):
        RUNTIME.load(artifact.path, files, artifact.signature)
