import json
import sys
from pathlib import Path
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import yaml
from lightning.pytorch import Trainer
from plain_project.training import Classifier, Data

from lightning_quant import cli, runtimes
from lightning_quant.artifact import Artifact, read

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.filterwarnings("ignore:.*max_epochs.*:UserWarning"),
]

EXAMPLE = Path(__file__).parents[1] / "examples" / "plain_project"
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of a module of another width than its default, and the example's configuration."""
    folder = tmp_path_factory.mktemp("project")
    trainer = Trainer(max_epochs=1, limit_train_batches=20, accelerator="cpu", enable_checkpointing=False, **QUIET)
    trainer.fit(Classifier(width=8), Data())
    trainer.save_checkpoint(folder / "best.ckpt")
    (folder / "quantize.yaml").write_text((EXAMPLE / "quantize.yaml").read_text())
    return folder


@pytest.fixture(scope="module")
def quantized(project: Path) -> Artifact:
    """What the command makes of it."""
    arguments = ("--output", "out", "--threads", "1", "--num-batches=4", "--sensitivity=true")
    code = run_in(project, "quantize", "--config", "quantize.yaml", *arguments)
    assert code == 0
    return read(project / "out")


def run_in(folder: Path, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        return cli.main(list(arguments))


def test_example_has_three_lines_of_yaml_and_knows_nothing_of_this_package() -> None:
    assert len((EXAMPLE / "quantize.yaml").read_text().splitlines()) == 3
    assert all("lightning_quant" not in path.read_text() for path in EXAMPLE.iterdir() if path.is_file())


def test_quantize_uses_the_projects_own_classes_checkpoint_and_validation(quantized: Artifact, project: Path) -> None:
    # Hyperparameters come from the checkpoint, which LightningCLI did not write.
    weights = {row["name"]: row["macs"] for row in quantized.plan["rows"]}
    (row,) = quantized.report["metrics"]

    assert weights["0"] == 8 * 9 * 64 * 32
    assert row["name"] == "val_accuracy"
    assert row["artifact"] == pytest.approx(row["float_value"], abs=0.02)
    assert row["float_value"] > 0.5
    assert any("best.ckpt" in note for note in quantized.report["notes"])
    assert {layer["name"] for layer in quantized.report["sensitivity"]["layers"]} == {
        row["name"] for row in quantized.plan["rows"] if row["action"] == "int8" and not row["reason"]
    }


def test_quantize_prints_json_and_fails_with_the_number(
    project: Path, quantized: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--config", "quantize.yaml", "--output", "again", "--threads", "1", "--evaluate", "false", "--json")
    code = run_in(project, "quantize", *arguments, "--max-size-ratio", "0.01")
    captured = capsys.readouterr()
    answer = json.loads(captured.out)

    assert code == 1
    assert answer["bytes"] == read(project / "again").size_bytes
    (missed,) = answer["missed"]
    assert "size ratio is 0." in missed
    assert missed in captured.err


def test_runtime_and_engine_are_options(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "names", lambda: ["openvino", "torch"])
    arguments = ("--config", "quantize.yaml", "--threads", "1", "--evaluate", "false", "--num-batches=2")
    assert run_in(project, "quantize", *arguments, "--output", "auto", "--runtime", "auto") == 0
    artifact = read(project / "auto")
    assert artifact.manifest["runtime"] in ("openvino", "torch")
    assert any("was chosen as the fastest" in note for note in artifact.report["notes"])

    engine = ("--runtime", "torch", "--engine", "qnnpack")
    assert run_in(project, "quantize", *arguments, "--output", "qnnpack", *engine) == 0
    assert read(project / "qnnpack").manifest["engine"]["name"] == "qnnpack"


def test_classes_may_be_named_on_the_command_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "plain.yaml").write_text(yaml.safe_dump({"model": {"width": 8}}))
    classes = ("--model-class", "plain_project.training.Classifier", "--data-class", "plain_project.training.Data")
    code = run_in(project, "inspect", "--config", "plain.yaml", *classes, "--json", "--exclude", '["0"]')
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}

    assert code == 0
    assert rows["0"]["action"] == "float"
    assert rows["0"]["reason"] == 'excluded by "0"'
    assert rows["4"]["action"] == "int8"


def test_inspect_says_what_would_be_quantized(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "inspect.yaml").write_text(
        "model: plain_project.training.Classifier\ndata: plain_project.training.Data\n"
    )

    assert run_in(project, "inspect", "--config", "inspect.yaml") == 0
    assert "4 operators in int8, 100.0% of the multiply-adds" in capsys.readouterr().out
    assert not (project / "quantized").exists()


def test_users_own_cli_gains_the_subcommand(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_quant.quantize_command import QuantizationCLI

    output = project / "own"
    arguments = ["quantize", f"--ckpt_path={project / 'best.ckpt'}", f"--output={output}", "--evaluate=false"]
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments, "--threads=1", "--trainer.logger=false"])
    made = QuantizationCLI(Classifier, Data, save_config_callback=None)

    assert made.result.path == output
    assert read(output).plan["coverage"] == 1.0
    assert {"fit", "validate", "test", "predict", "quantize", "inspect"} == set(QuantizationCLI.subcommands())


@pytest.mark.parametrize(
    ("limits", "code", "message"),
    [
        ((), 0, ""),
        (("--max-accuracy-drop", "0.5", "--max-size-ratio", "1.9", "--min-speedup", "0.001"), 0, ""),
        (("--max-accuracy-drop", "-0.5"), 1, "val_accuracy fell by"),
        (("--max-size-ratio", "0.1"), 1, "size ratio is 0."),
        (("--min-speedup", "1000"), 1, "times as fast as float, less than 1000"),
    ],
)
def test_limits_decide_the_exit_code(
    limits: tuple[str, ...], code: int, message: str, quantized: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (("report",), ("compare", str(quantized.path))):
        assert cli.main([*command, str(quantized.path), *limits]) == code
        assert message in capsys.readouterr().err


def test_limits_on_what_was_not_measured_fail(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(project / "unmeasured")
    arguments = ("--config", "quantize.yaml", "--output", path, "--evaluate=false", "--num_batches=1", "--threads=1")
    assert run_in(project, "quantize", *arguments, "--max-accuracy-drop", "1") == 1
    assert "none is known to keep within the limit" in capsys.readouterr().err


def test_report_and_compare(quantized: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(quantized.path)]) == 0
    assert capsys.readouterr().out.strip() == quantized.report_path.read_text().strip()
    assert cli.main(["report", str(quantized.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == quantized.report
    assert cli.main(["compare", str(quantized.path), str(quantized.path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert f"{quantized.size_bytes:,}" in table[2]
    assert cli.main(["compare", str(quantized.path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["val_accuracy"] == quantized.report["metrics"][0]["artifact"]


def test_verify(quantized: Artifact, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_quant.runtimes.onnxruntime import OnnxRuntimeModule

    assert cli.main(["verify", str(quantized.path)]) == 0
    assert "Verification ok" in capsys.readouterr().out
    run = OnnxRuntimeModule.run
    monkeypatch.setattr(OnnxRuntimeModule, "run", lambda self, tensors: [-output for output in run(self, tensors)])
    assert cli.main(["verify", str(quantized.path), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["failures"]
    assert answer["identical"] is False


def test_bench(quantized: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(quantized.path)
    assert cli.main(["bench", path, path, "--batches", "1", "6", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["batch"], row["threads"]) for row in rows] == [(1, 1), (6, 1)] * 2
    for row in rows:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["samples_per_s"] == pytest.approx(1000 * row["batch"] / row["median_ms"])
        assert row["peak_bytes"] > 0
        assert (row["speedup"] is None) == (row["batch"] == 6)
    assert cli.main(["bench", path, "--batches", "1", "--against", "float", "--min-speedup", "1000"]) == 1
    captured = capsys.readouterr()
    assert "times faster than float when written" in captured.out
    assert "times as fast as float" in captured.err


@pytest.mark.parametrize("command", ["verify", "report", "compare", "bench"])
def test_folder_that_is_no_artifact(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, str(tmp_path)]) == 2
    assert f"lightning-quant {command}: Expected" in capsys.readouterr().err


def test_errors_before_training_have_their_own_exit_code(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in(project, "quantize", "--config", "quantize.yaml", "--recipe", "int5") == 2
    assert "Expected `recipe` to be one of" in capsys.readouterr().err
    assert run_in(project, "inspect", "--model-class", "nowhere.Model") == 2
    assert "Expected an import path" in capsys.readouterr().err


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["quantize", "--config", "any.yaml"]) == 2
    assert "pip install 'lightning_quant[cli]'" in capsys.readouterr().err


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        cli.main(["verify", "folder", "--surprise"])
    assert refusal.value.code == 2
    assert "--surprise" in capsys.readouterr().err


def test_progress_is_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from lightning_quant import progress

    monkeypatch.setattr(progress, "_DELAY_S", 0)
    with progress.shown("Exporting"):
        assert list(progress.tracked(range(3), "Calibrating", "batch")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.shown("Exporting"):
        assert list(progress.tracked(range(3), "Calibrating", "batch")) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert "Exporting" in shown
    assert "Calibrating" in shown
