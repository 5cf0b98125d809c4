import importlib
import importlib.util
import inspect
import os
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lightning_quant

_HEAVY = ("onnx", "onnxruntime", "onnxscript", "torchao", "lightning", "matplotlib", "sklearn")


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh Python that finds the package where this one does."""
    paths = [path for path in sys.path if path]
    code = f"import sys; sys.path[:0] = {paths!r}\n{code}"
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_import_is_lean_and_quiet() -> None:
    result = run(f"import lightning_quant; print([name for name in {_HEAVY!r} if name in sys.modules])")

    assert result.stderr == ""
    assert result.stdout == "[]\n"
    assert result.returncode == 0


def test_loading_an_artifact_needs_no_lightning() -> None:
    result = run(
        "import warnings; warnings.simplefilter('ignore')\n"
        "from lightning_quant import load, quantize\n"
        "print([name for name in ('lightning', 'torchao', 'sklearn') if name in sys.modules])"
    )

    assert result.stdout == "[]\n"


def test_the_version_is_one_literal_that_a_build_reads_without_importing() -> None:
    root = Path(lightning_quant.__file__).parents[1]
    result = run(
        "import os; sys.modules['torch'] = None\nfrom setuptools.config.pyprojecttoml import read_configuration\n"
        f"print(read_configuration({str(root / 'pyproject.toml')!r})['project']['version'])"
    )

    assert result.stdout.strip() == lightning_quant.__version__, result.stderr


def test_public_names_are_what_they_say() -> None:
    # Importing a submodule binds its name in the package, which must not hide a function of that name.
    for module in pkgutil.walk_packages(lightning_quant.__path__, "lightning_quant."):
        # Its kernels are written in a language that CUDA builds of PyTorch bring.
        if module.name != "lightning_quant.numerics.triton_kernels" or importlib.util.find_spec("triton"):
            importlib.import_module(module.name)

    assert inspect.isfunction(lightning_quant.quantize)
    assert inspect.isfunction(lightning_quant.load)
    assert all(
        inspect.isfunction(getattr(lightning_quant, n)) or inspect.isclass(getattr(lightning_quant, n))
        for n in lightning_quant.__all__
    )


def test_public_names_are_documented() -> None:
    assert all(getattr(lightning_quant, name).__doc__ for name in lightning_quant.__all__)


def test_unknown_name_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lightning_quant' has no attribute 'quantise'"):
        lightning_quant.quantise  # noqa: B018
    with pytest.raises(AttributeError, match="Did you mean 'QuantizationAwareTraining'"):
        lightning_quant.QAT  # noqa: B018
    assert not hasattr(lightning_quant, "nothing")


def test_editable_install_is_a_path_that_type_checkers_follow(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    root = Path(lightning_quant.__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        pytest.skip("runs from a checkout")
    project = tmp_path / "project"
    (project / "lightning_quant").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "lightning_quant/__init__.py", "lightning_quant/py.typed"):
        shutil.copy(root / name, project / name)
    build = "import os, setuptools.build_meta as m; print(m.build_editable(os.environ['OUT']))"
    environment = {**os.environ, "OUT": str(tmp_path)}
    subprocess.run([sys.executable, "-c", build], cwd=project, env=environment, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel)
    paths = [name for name in files.namelist() if name.endswith(".pth")]

    assert [files.read(name).decode().strip() for name in paths] == [str(project)]
    assert not any(name.endswith(".py") for name in files.namelist())
