"""An artifact that the tests of this room share, and a copy of it for each that damages one."""

import shutil
from pathlib import Path

import pytest
from small_artifacts import make

from lightning_quant import Artifact


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make(tmp_path_factory.mktemp("artifact") / "quantized")


@pytest.fixture
def folder(original: Artifact, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original.path, tmp_path / "copy"))
