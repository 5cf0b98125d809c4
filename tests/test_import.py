import importlib
import inspect
import pkgutil
import subprocess
import sys

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


def test_public_names_are_what_they_say() -> None:
    # Importing a submodule binds its name in the package, which must not hide a function of that name.
    for module in pkgutil.walk_packages(lightning_quant.__path__, "lightning_quant."):
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
    assert not hasattr(lightning_quant, "nothing")
