"""The lines at the end of report.md, where neither this package nor torch is installed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import lightning_models  # noqa: F401  makes exporting quick
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quant import load, quantize
from lightning_quant.artifact import Artifact

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")

# What a runtime's own package needs, and nothing else: an environment without this package and without torch.
NEEDED = {"onnxruntime": ("numpy", "onnxruntime", "flatbuffers", "google", "packaging")}
RUN = """
import sys

sys.path.append({site!r})
for absent in ("lightning_quant", "torch", "safetensors", "lightning"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{{absent}} is installed")
import numpy

numpy.zeros = lambda shape, dtype: numpy.linspace(0, 1.9, int(numpy.prod(shape))).reshape(shape).astype(dtype)
exec({code!r})
numpy.savez({out!r}, **outputs)
"""


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.embed = nn.Linear(6, 4), nn.Embedding(3, 6)

    def forward(self, x: Tensor, token: Tensor, *, mask: Tensor) -> dict[str, Tensor]:
        scores = self.fc(x + self.embed(token).mean(1))
        return {"scores": scores, "kept": mask & (scores.sum(1) > 0)}


def without_package(folder: Path, runtime: str) -> Path:
    """Return a folder that holds a runtime's own packages and nothing else."""
    for name in NEEDED[runtime]:
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        (found,) = list(spec.submodule_search_locations or [])[:1]
        (folder / name).symlink_to(found)
        libraries = Path(found).with_name(f"{name}.libs")
        if libraries.is_dir():
            (folder / libraries.name).symlink_to(libraries)
    return folder


def lines(artifact: Artifact) -> str:
    assert artifact.report_path is not None
    blocks = re.findall(r"```python\n(.*?)```", artifact.report_path.read_text(), re.DOTALL)
    assert artifact.report_path.read_text().rstrip().endswith("```")
    return blocks[-1]


def test_lines_in_the_report_run_the_model_where_the_package_is_not_installed(tmp_path: Path) -> None:
    x, token = torch.randn(8, 6), torch.randint(0, 3, (8, 2))
    call = {"x": x, "token": token, "mask": torch.ones(8, dtype=torch.bool)}
    artifact = quantize(Pair(), calibration_data=[call], output_dir=tmp_path / "artifact")
    site = tmp_path / "site"
    site.mkdir()
    code = RUN.format(
        site=str(without_package(site, "onnxruntime")), code=lines(artifact), out=str(tmp_path / "outputs.npz")
    )
    # Isolated and without site-packages: only the standard library is there.
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=artifact.path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    actual = np.load(tmp_path / "outputs.npz")
    one = torch.linspace(0, 1.9, 6, dtype=torch.float64).reshape(1, 6).float()
    expected = load(artifact.path)(x=one, token=torch.tensor([[0, 1]]), mask=torch.zeros(1, dtype=torch.bool))

    assert list(actual) == ["scores", "kept"]
    for name, value in expected.items():
        torch.testing.assert_close(torch.from_numpy(actual[name]), value)


def test_lines_are_few(tmp_path: Path) -> None:
    artifact = quantize(nn.Linear(6, 4), calibration_data=[torch.randn(8, 6)], output_dir=tmp_path)
    code = lines(artifact)

    assert len([line for line in code.splitlines() if line]) <= 9
    assert artifact.model_path.name in code
    assert "# any size: batch = axis 0" in code
    assert "lightning_quant" not in code


def test_report_and_manifest_say_what_stays_outside(tmp_path: Path) -> None:
    x = torch.tensor([[0.0] * 6, [2.5] * 6])
    artifact = quantize(nn.Linear(6, 4), calibration_data=[x], output_dir=tmp_path)

    outside = artifact.manifest["outside"]
    assert "the forward of Linear alone" in outside
    assert "normalization" in outside
    assert "softmax" in outside
    assert "`input` lay in [0, 2.5]" in outside
    assert artifact.report_path is not None
    assert outside in artifact.report_path.read_text()
