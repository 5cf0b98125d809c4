"""A small artifact and its manifest, changed as one who knows how its hash is made."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_quant import Artifact, quantize
from lightning_quant.artifact.manifest import dump

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def make(folder: Path, seed: int = 0) -> Artifact:
    """Write an artifact of a net that the seed decides."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return quantize(model, calibration_data=[X], output_dir=folder)


def change_manifest(folder: Path, **values: Any) -> None:
    """Change a manifest as one who knows how its hash is made."""
    path = folder / "manifest.json"
    text, _ = dump({**json.loads(path.read_text()), **values})
    path.write_text(text)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make(tmp_path_factory.mktemp("artifact") / "quantized")


@pytest.fixture
def folder(original: Artifact, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original.path, tmp_path / "copy"))
