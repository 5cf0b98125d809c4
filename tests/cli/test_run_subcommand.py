"""Which configuration and classes a command line means, and what of them is trusted."""

import json
from pathlib import Path
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
from command_line import EXAMPLE, run_in

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.filterwarnings("ignore:.*max_epochs.*:UserWarning"),
]


def test_inspect_takes_a_checkpoint_with_a_configuration_or_classes(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(project / "best.ckpt")
    classes = ("--model-class", "plain_project.training.Classifier", "--data-class", "plain_project.training.Data")
    for arguments in (
        (checkpoint, "--config", str(EXAMPLE / "quantize.yaml")),
        ("--exclude", '["8"]', checkpoint, *classes),
    ):
        assert run_in(tmp_path, "inspect", *arguments, "--json") == 0
        assert json.loads(capsys.readouterr().out)["rows"][0]["macs"] == 8 * 9 * 64 * 32
    assert run_in(tmp_path, "inspect", checkpoint) == 2
    assert "say of which class it is" in capsys.readouterr().err


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("command", ["inspect", "quantize"])
def test_code_of_a_checkpoint_runs_only_when_told_so(
    command: str, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof, checkpoint = tmp_path / "proof", tmp_path / "other.ckpt"
    saved = torch.load(project / "best.ckpt", weights_only=True)
    torch.save({**saved, "more": Touches(proof)}, checkpoint)
    arguments = ["--config", str(EXAMPLE / "quantize.yaml"), "--ckpt_path", str(checkpoint)]
    arguments += ["--evaluate=false", "--threads=1"] if command == "quantize" else []
    assert run_in(tmp_path, command, *arguments) == 2
    assert "`--trust` on the command line" in capsys.readouterr().err
    assert not proof.exists()
    assert run_in(tmp_path, command, *arguments, "--trust") == 0
    assert proof.exists()


def test_classes_that_a_checkpoint_names_are_imported_only_when_told_so(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = torch.load(project / "best.ckpt", weights_only=True)
    (tmp_path / "named_by_checkpoint.py").write_text("from pathlib import Path\nPath('proof').touch()\n")
    named = {"class_path": "named_by_checkpoint.Model"}
    for number, values in enumerate(({"_class_path": named["class_path"]}, {"width": 8, "net": [{"deep": named}]})):
        checkpoint = tmp_path / f"{number}.ckpt"
        torch.save({**saved, "hyper_parameters": values}, checkpoint)
        classes = () if number == 0 else ("--config", str(EXAMPLE / "quantize.yaml"))
        assert run_in(tmp_path, "inspect", str(checkpoint), *classes) == (2 if number == 0 else 0)
        assert not (tmp_path / "proof").exists()
        if number == 0:
            assert "`--model-class named_by_checkpoint.Model`, or add `--trust`" in capsys.readouterr().err


def test_errors_before_training_have_their_own_exit_code(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in(project, "inspect", "--model-class", "nowhere.Model") == 2
    assert "Expected an import path" in capsys.readouterr().err
    assert run_in(project, "inspect", "nowhere.ckpt") == 2
    assert "'nowhere.ckpt' is no file" in capsys.readouterr().err
