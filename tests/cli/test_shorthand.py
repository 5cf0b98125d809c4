"""LightningCLI knows the callbacks by their bare names."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh Python that finds the package where this one does."""
    paths = [path for path in sys.path if path]
    code = f"import sys; sys.path[:0] = {paths!r}\n{code}"
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("first", ["import lightning_quant", "from lightning.pytorch.cli import LightningCLI"])
def test_lightning_cli_knows_the_callbacks_by_their_bare_names(first: str, tmp_path: Path) -> None:
    arguments = ["--trainer.callbacks+=QuantizationAwareTraining", "--trainer.callbacks.output_dir=q"]
    result = run(
        f"import warnings; warnings.simplefilter('ignore')\n{first}\nimport lightning_quant\n"
        "from lightning.pytorch import LightningModule\nfrom lightning.pytorch.cli import LightningCLI\n"
        f"cli = LightningCLI(LightningModule, run=False, save_config_callback=None, args={arguments!r})\n"
        "print([c.output_dir for c in cli.trainer.callbacks if type(c).__name__ == 'QuantizationAwareTraining'])"
    )

    assert result.stdout == "['q']\n", result.stderr
