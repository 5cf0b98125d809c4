"""The example project and the command, run in a folder as a user would."""

import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_quant.cli import cli

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_project"
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def run_in(folder: Path, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        return cli.main(list(arguments))
