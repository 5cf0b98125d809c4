"""A trained project and what the command makes of it, which the tests of this room share."""

from pathlib import Path

import pytest
from command_line import EXAMPLE, QUIET, run_in
from lightning.pytorch import Trainer
from plain_project.training import Classifier, Data

from lightning_quant.artifact.artifact import Artifact, read


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of a module of another width than its default, and the example's configuration."""
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
