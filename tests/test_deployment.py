"""The programs of the page on deployment compile, run and answer what the artifact answers."""

import glob
import re
import subprocess
from pathlib import Path

import lightning_models  # noqa: F401  makes exporting quick
import openvino
import pytest
import torch
from torch import nn

from lightning_quant import load, quantize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("unmeasured"),
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
]
PAGE = (Path(__file__).parent.parent / "examples" / "deployment.md").read_text()


def program(heading: str) -> str:
    """Return the block of the page that has this heading."""
    (code,) = re.findall(rf"^```{heading}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return code


def expected(runtime: str, folder: Path) -> float:
    """Write an artifact for the program; return the number that it is to print."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(8, 10))
    path = folder / f"quantized_{runtime}"
    quantize(net.eval(), "int8", runtime, calibration_data=torch.rand(8, 1, 8, 8), output_dir=path)
    return load(path)(torch.ones(2, 1, 8, 8))[0, 1].item()


def printed(folder: Path, *command: str) -> float:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def compiled(folder: Path, heading: str, *options: str) -> float:
    (folder / "main.cpp").write_text(program(heading))
    subprocess.run(["g++", "main.cpp", "-o", "main", *options], cwd=folder, check=True)
    return printed(folder, "./main")


def test_openvino_in_cpp(tmp_path: Path) -> None:
    number = expected("openvino", tmp_path)
    package = Path(openvino.__file__).parent
    (library,) = glob.glob(f"{package}/libs/libopenvino.so.*")
    rpath = f"-Wl,-rpath,{package}/libs"
    assert compiled(tmp_path, "cpp openvino", "-std=c++17", f"-I{package}/include", library, rpath) == pytest.approx(
        number, abs=1e-5
    )


def test_inductor_in_cpp(tmp_path: Path) -> None:
    number = expected("inductor", tmp_path)
    package = Path(torch.__file__).parent
    headers = [f"-I{package}/include", f"-I{package}/include/torch/csrc/api/include"]
    libraries = [f"-L{package}/lib", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{package}/lib"]
    assert compiled(tmp_path, "cpp inductor", "-std=c++20", *headers, *libraries) == pytest.approx(number, abs=1e-5)


def test_onnxruntime_in_javascript(tmp_path: Path) -> None:
    number = expected("onnxruntime", tmp_path)
    subprocess.run(["npm", "install", "--silent", "onnxruntime-web@1.30.0"], cwd=tmp_path, check=True)
    (tmp_path / "main.mjs").write_text(program("js onnxruntime"))
    assert printed(tmp_path, "node", "main.mjs") == pytest.approx(number, abs=1e-5)
