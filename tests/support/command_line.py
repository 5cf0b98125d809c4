"""The example project and the command, run in a folder as a user would."""

import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from lightning_quant.artifact.artifact import Artifact, read
from lightning_quant.cli import cli

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_project"
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def run_in(folder: Path, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        return cli.main(list(arguments))


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of a module of another width than its default, and the example's configuration."""
    from plain_project.training import Classifier, Data

    folder = tmp_path_factory.mktemp("project")
    trainer = Trainer(max_epochs=1, limit_train_batches=20, accelerator="cpu", enable_checkpointing=False, **QUIET)
    trainer.fit(Classifier(width=8), Data())
    trainer.save_checkpoint(folder / "best.ckpt")
    (folder / "quantize.yaml").write_text((EXAMPLE / "quantize.yaml").read_text())
    return folder


@pytest.fixture(scope="session")
def quantized(project: Path) -> Artifact:
    """What the command makes of it."""
    arguments = ("--output", "out", "--threads", "1", "--num-batches=4", "--sensitivity=true")
    code = run_in(project, "quantize", "--config", "quantize.yaml", *arguments)
    assert code == 0
    return read(project / "out")
