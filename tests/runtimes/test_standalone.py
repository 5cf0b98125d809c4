"""The lines at the end of report.md, where this package is not installed, nor torch where ONNX Runtime runs them."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import lightning_models  # noqa: F401  makes exporting quick
import numpy as np
import pytest
import torch
from models import ResidualNet, with_statistics
from torch import Tensor, nn

from lightning_quant import load, quantize
from lightning_quant.artifact.artifact import Artifact, add_report
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
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


# Everything that is installed but this package, what it is built on, and the lists of packages, which load them.
ABSENT = ("lightning_quant", "lightning", "pytorch_lightning")
RUN_ON_TORCH = """
import sys

sys.path.append({site!r})
for absent in {absent!r}:
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{{absent}} is installed")
import math
import torch

names = {{"filled": lambda shape, dtype: torch.linspace(0, 1.9, math.prod(shape)).reshape(shape).to(dtype)}}
names["filled_array"] = lambda shape, dtype: names["filled"](shape, torch.float32).numpy().astype(dtype)
exec({code!r}, names)
torch.save({{name: torch.as_tensor(value) for name, value in names["outputs"].items()}}, {out!r})
"""


def everything_else(folder: Path) -> Path:
    """Return a folder with all that is installed, this package and Lightning left out."""
    for directory in dict.fromkeys(path for path in sys.path if path.endswith(("site-packages", "dist-packages"))):
        for entry in Path(directory).iterdir():
            name = entry.name.partition(".")[0].partition("-")[0]
            if name not in ABSENT and entry.suffix != ".pth" and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.mark.parametrize(
    "runtime", ["openvino", "torch", "executorch", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_lines_of_every_runtime_run_the_model_where_the_package_is_not_installed(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared = prepare(with_statistics(ResidualNet()).eval(), (IMAGE,), runtime=runtime, observer="min_max")
    calibrate(prepared, steps_of(prepared, [IMAGE]))
    artifact = add_report(export(prepared, tmp_path / "artifact"), {}, "# Report")
    site = tmp_path / "site"
    site.mkdir()
    code = lines(artifact).replace("torch.zeros(", "filled(").replace("np.zeros(", "filled_array(")
    out = tmp_path / "outputs.pt"
    script = RUN_ON_TORCH.format(site=str(everything_else(site)), absent=ABSENT, code=code, out=str(out))
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], cwd=artifact.path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    x = torch.linspace(0, 1.9, IMAGE[0].numel()).reshape(1, *IMAGE.shape[1:])
    (name,) = (info.name for info in artifact.signature.outputs)

    torch.testing.assert_close(torch.load(out)[name], load(artifact.path)(x))


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
