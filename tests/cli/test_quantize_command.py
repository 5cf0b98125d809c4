"""What LightningCLI gains, in one's own main.py."""

import json
import sys
from pathlib import Path

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import yaml
from command_line import EXAMPLE, run_in
from plain_project.training import Classifier, Data

from lightning_quant.artifact.artifact import read

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.filterwarnings("ignore:.*max_epochs.*:UserWarning"),
    # Whether an earlier test has set one.
    pytest.mark.filterwarnings("ignore:No seed found:UserWarning"),
]


def test_users_own_cli_gains_the_subcommand(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_quant.cli.quantize_command import QuantizationCLI

    output = project / "own"
    arguments = ["quantize", f"--ckpt_path={project / 'best.ckpt'}", f"--output={output}", "--evaluate=false"]
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments, "--threads=1", "--trainer.logger=false"])
    made = QuantizationCLI(Classifier, Data, save_config_callback=None)

    assert made.result.path == output
    assert read(output).plan["coverage"] == 1.0
    assert {"fit", "validate", "test", "predict", "quantize", "sweep", "inspect"} == set(QuantizationCLI.subcommands())


def test_mistakes_in_ones_own_cli_are_one_line_and_no_traceback(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_quant.cli.quantize_command import QuantizationCLI

    mistakes = {"`recipe` to be one of": (project / "best.ckpt", "int5"), "`ckpt_path`": (project / "no.ckpt", "int8")}
    for said, (checkpoint, recipe) in mistakes.items():
        arguments = [f"--ckpt_path={checkpoint}", f"--recipe={recipe}", "--trainer.logger=false"]
        monkeypatch.setattr(sys, "argv", ["main.py", "quantize", *arguments])
        with pytest.raises(SystemExit) as ended:
            QuantizationCLI(Classifier, Data, save_config_callback=None)
        assert ended.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"main.py quantize: Expected {said}")


def test_limits_in_yaml_are_those_of_the_command_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_quant.cli.quantize_command import QuantizationCLI

    limits = {"max_drop": {"val_accuracy": -2.0, "val_f1": 0.1}, "higher_is_better": ["val_accuracy"]}
    content = {**yaml.safe_load((EXAMPLE / "quantize.yaml").read_text()), "limits": limits, "threads": 1}
    (project / "limits.yaml").write_text(yaml.safe_dump(content))
    arguments = ["quantize", "--config", "limits.yaml", "--output", "limited", "--num_batches=1"]
    assert run_in(project, *arguments, "--json") == 1
    captured = capsys.readouterr()
    missed = json.loads(captured.out)["missed"]
    assert missed[1].endswith(": limits FAILED: no metric 'val_f1' was measured, but val_accuracy")
    assert "val_accuracy fell by" in missed[0]
    assert all(text in captured.err for text in missed)

    content = {"limits": limits, "ckpt_path": str(project / "best.ckpt"), "threads": 1, "output": str(project / "own1")}
    (project / "own.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(sys, "argv", ["main.py", "quantize", f"--config={project}/own.yaml", "--trainer.logger=false"])
    with pytest.raises(SystemExit) as ended:
        QuantizationCLI(Classifier, Data, save_config_callback=None)
    assert ended.value.code == 1
    assert "main.py quantize: " in capsys.readouterr().err


def test_limits_by_name_are_searched_from_yaml_and_from_the_command_line(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("report.make_report", "search.files"):
        monkeypatch.setattr(f"lightning_quant.{place}.peak_of", lambda *_: 3 * 2**20)
        monkeypatch.setattr(f"lightning_quant.{place}.float_peak_of", lambda *_: 4 * 2**20)
    content = {**yaml.safe_load((EXAMPLE / "quantize.yaml").read_text()), "threads": 1, "max_validations": 2}
    content["limits"] = {"val_accuracy": -0.5, "speedup": 1e6, "peak_memory_ratio": 0.5}
    (project / "searched.yaml").write_text(yaml.safe_dump(content))
    arguments = ["quantize", "--config", "searched.yaml", "--output", "searched", "--num_batches=2"]
    limits = '{"val_accuracy": -0.5, "peak_memory_ratio": 0.75}'
    assert run_in(project, *arguments, "--limits", limits, "--objective", "size") == 0
    search = read(project / "searched").report["search"]  # type: ignore[index]
    assert [search["objective"], len(search["trials"])] == ["size", 1]
    assert [(verdict["limit"], verdict["kept"]) for verdict in search["verdicts"]] == [
        ("val_accuracy", True),
        ("peak_memory_ratio", True),
    ]
    capsys.readouterr()
    assert run_in(project, *arguments) == 1
    said = capsys.readouterr().err
    assert "times as fast as float, less than 1000000.0" in said
    assert "a process takes 0.750 of float's memory at its peak, more than 0.5" in said
    assert run_in(project, *arguments, "--limits", '{"val_acuracy": -0.5}') == 2
    assert "'val_accuracy' was probably meant" in capsys.readouterr().err


def test_several_recipes_from_yaml_and_from_the_command_line(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_quant.report.make_report.measure_latency", lambda *_, **__: ((), ()))
    content = yaml.safe_load((EXAMPLE / "quantize.yaml").read_text())
    content |= {"threads": 1, "recipe": ["int8_weight_only", "float16"], "evaluate": False}
    (project / "several.yaml").write_text(yaml.safe_dump(content))
    assert run_in(project, "quantize", "--config", "several.yaml", "--output", "several", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert {point["name"] for point in printed["sweep"]["points"]} == {
        "int8_weight_only-onnxruntime",
        "float16-onnxruntime",
    }
    assert Path(printed["artifact"]).name == printed["sweep"]["recommended"]
    arguments = ["sweep", "--config", "quantize.yaml", "--output", "swept", "--recipe=[int8_weight_only]"]
    assert run_in(project, *arguments, "--runtime=[onnxruntime, torch]", "--evaluate=false", "--threads=1") == 0
    said = capsys.readouterr().out
    assert "2 artifacts of one training" in said
    assert "int8_weight_only-torch" in said
    assert (project / "swept" / "sweep.html").is_file()
