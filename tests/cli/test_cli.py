import contextlib
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
import yaml
from command_line import EXAMPLE, run_in
from lightning.pytorch.cli import LightningCLI
from plain_project.training import Classifier

from lightning_quant import runtimes
from lightning_quant.artifact.artifact import Artifact, read
from lightning_quant.cli import cli
from lightning_quant.measure import bench

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.filterwarnings("ignore:.*max_epochs.*:UserWarning"),
]


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
    said = capsys.readouterr().out
    assert "4 operators in int8, 100.0% of the multiply-adds" in said
    assert "Multiply-adds are those of the captured batch: input (32, 1, 8, 8)." in said
    assert not (project / "quantized").exists()


def test_overrides_can_be_given_as_the_report_writes_them(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = '{"name": "int8_accurate", "overrides": {"0": "float", "8": "int4_weights"}}'
    assert run_in(project, "inspect", "--config", "quantize.yaml", "--recipe", recipe, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recipe"] == "int8_accurate"
    assert {row["name"]: row["action"] for row in plan["rows"]}["0"] == "float"
    assert run_in(project, "inspect", "--config", "quantize.yaml", "--recipe", '{"overrides": {"9": "float"}}') == 2
    assert "'9', which matches nothing" in capsys.readouterr().err


def test_inspect_takes_the_configuration_of_quantize_before_its_checkpoint_exists(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text((EXAMPLE / "quantize.yaml").read_text())
    assert run_in(tmp_path, "inspect", "config.yaml", "--json") == 0
    captured = capsys.readouterr()
    # The class's own width, where the checkpoint's would be 8.
    assert json.loads(captured.out)["rows"][0]["macs"] == 16 * 9 * 64 * 32
    assert "best.ckpt is not there yet" in captured.err


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of LightningCLI, whose classes are named in its configuration."""
    folder = tmp_path_factory.mktemp("fitted")
    arguments = ["--model=plain_project.training.Classifier", "--model.init_args.width=4"]
    arguments += ["--data=plain_project.training.Data", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    arguments += ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}"]
    arguments += ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", "fit", *arguments, "--trainer.enable_progress_bar=false"])
        LightningCLI()
    return folder / "lightning_logs" / "version_0"


def test_configuration_that_lightning_cli_saved_is_taken_as_it_is(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = (fitted / "checkpoints").iterdir()
    arguments = ("--ckpt_path", str(checkpoint), "--output", "out", "--evaluate=false", "--threads=1")
    assert run_in(tmp_path, "quantize", "--config", str(fitted / "config.yaml"), *arguments) == 0
    assert read(tmp_path / "out").plan["rows"][0]["macs"] == 4 * 9 * 64 * 32
    capsys.readouterr()
    # Its configuration is found beside a checkpoint, and what it names is imported when told so.
    assert run_in(tmp_path, "inspect", str(checkpoint), "--json") == 2
    assert f"`--config {fitted / 'config.yaml'}`, or add `--trust`" in capsys.readouterr().err
    assert run_in(tmp_path, "inspect", str(checkpoint), "--json", "--trust") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["macs"] == 4 * 9 * 64 * 32


def test_commands_of_the_page_run_one_after_the_other(project: Path, tmp_path: Path) -> None:
    readme = (EXAMPLE.parent / "README.md").read_text()
    (block,) = [text for text in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL) if "lightning-quant" in text]
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    (configuration,) = [text for text in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "ckpt_path" in text]
    assert configuration == (EXAMPLE / "quantize.yaml").read_text()
    shutil.copy(project / "best.ckpt", tmp_path)
    (tmp_path / "config.yaml").write_text(configuration)
    codes = {}
    for _, subcommand, *arguments in commands:
        if subcommand == "compare":
            shutil.copytree(tmp_path / "quantized", tmp_path / "other")
        codes[subcommand] = run_in(tmp_path, subcommand, *arguments)

    # The limits of the comparison are not for a net this small.
    assert codes == {**dict.fromkeys(("inspect", "quantize", "verify", "bench", "report"), 0), "compare": 1}


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
    assert json.loads(capsys.readouterr().out) == {"schema_version": 1, **quantized.report}
    assert cli.main(["compare", str(quantized.path), str(quantized.path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert f"{quantized.size_bytes:,}" in table[2]
    assert cli.main(["compare", str(quantized.path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    measured = quantized.report["metrics"][0]
    assert row["metrics"]["val_accuracy"]["artifact"] == measured["artifact"]
    assert row["metrics"]["val_accuracy"]["delta"] == measured["artifact"] - measured["float_value"]
    assert all(name.isidentifier() and name.islower() for name in row)


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


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process measure, where nothing is asked about processes of their own, which begin in seconds."""

    def here(names: list[str], batches: list[int], threads: int) -> Any:
        task = json.dumps({"names": names, "batches": batches, "threads": threads})
        monkeypatch.setattr("sys.stdin", io.StringIO(task))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            bench._work()
        return json.loads(printed.getvalue())

    monkeypatch.setattr(bench, "_in_process", here)


@pytest.mark.usefixtures("measured_here")
def test_bench_takes_batches_and_limits_from_what_the_report_knows_of_float(
    quantized: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(quantized.path)
    limits = ("--min-speedup", "1000", "--max-size-ratio", "0.01", "--max-accuracy-drop", "-1")
    assert cli.main(["bench", path, "--against", "float", *limits]) == 1
    captured = capsys.readouterr()
    assert "times faster than float when written" in captured.out
    for batch in (1, 32):
        assert f"at batch {batch} on 1 thread it is" in captured.err
    assert "less than 1000" in captured.err
    assert "size ratio" in captured.err
    assert "val_accuracy fell by" in captured.err
    assert cli.main(["bench", path, "--batches", "3", "--min-speedup", "0.001"]) == 1
    assert "no speed-up is known" in capsys.readouterr().err


@pytest.mark.usefixtures("measured_here")
def test_bench_compares_with_no_float_time_of_another_processor(
    quantized: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = bench.bench([quantized.path], [1], [1])
    monkeypatch.setattr(bench, "cpu_name", lambda: "another")

    assert here[0].speedup is not None
    assert bench.bench([quantized.path], [1], [1])[0].speedup is None


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_bench_refuses_batches_of_no_samples(number: str, quantized: Artifact) -> None:
    with pytest.raises(SystemExit) as refusal:
        cli.main(["bench", str(quantized.path), "--batches", number])
    assert refusal.value.code == 2


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_limits_are_refused_where_they_would_mean_nothing(command: str, quantized: Artifact) -> None:
    if command == "verify":
        with pytest.raises(SystemExit):
            cli.main([command, str(quantized.path), "--min-speedup", "2"])
    else:
        assert cli.main([command, "--config", str(EXAMPLE / "quantize.yaml"), "--min-speedup=2"]) == 2


@pytest.mark.parametrize("command", ["verify", "report", "compare", "bench"])
def test_folder_that_is_no_artifact(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, str(tmp_path)]) == 2
    assert f"lightning-quant {command}: Expected" in capsys.readouterr().err


class Wider(Classifier):
    """Weights of another shape under the same names, and a hyperparameter that no checkpoint has."""

    def __init__(self, size: int) -> None:
        super().__init__(2 * size)


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    ((), "a configuration of LightningCLI"),
    (("--config", "nowhere.yaml"), "nowhere.yaml to be a configuration of LightningCLI"),
    (("--config", "broken.yaml"), "broken.yaml to be a configuration of LightningCLI"),
    (("--config", "plain.yaml"), "plain.yaml to name the class of `model`"),
    (("--config", "extra.yaml"), "'patience'"),
    (("--config", "extra.yaml"), "use QuantizationCLI there in place of LightningCLI"),
    (("--config", "foreign.yaml"), "No module named 'nowhere'"),
    (("--config", "quantize.yaml", "--ckpt_path", "nowhere.ckpt"), "but 'nowhere.ckpt' is no file"),
    (("--config", "quantize.yaml", "--ckpt_path", "best"), "only the Trainer that wrote it knows its name"),
    (("--config", "quantize.yaml", "--ckpt_path", "quantize.yaml"), "but it cannot be read"),
    (("--config", "quantize.yaml", "--ckpt_path", "weights.ckpt"), "with a `state_dict`"),
    (("--config", "quantize.yaml", "--model", "test_cli.Wider", "--model.size", "8"), "size mismatch"),
    (("--config", "quantize.yaml", "--model", "test_cli.Wider"), "size"),
    (("--config", "quantize.yaml", "--recipe", "int5"), "Expected `recipe` to be one of"),
    (("--config", "quantize.yaml", "--recipe", "int8_dynamc"), "Did you mean 'int8_dynamic'"),
    (("--config", "quantize.yaml", "--runtime", "abacus"), "Expected `runtime` to be one of"),
    (("--config", "quantize.yaml", "--module", "nett"), "Did you mean 'net'"),
    (
        ("--config", "quantize.yaml", "--reciep", "int8"),
        "--reciep int8. Did you mean '--recipe'",
    ),
    (("--config", "quantize.yaml", "--max-drp", "a=1"), "Did you mean '--max_drop'"),
    (("--config", "quantize.yaml", "--trainer.acelerator", "cpu"), "Did you mean '--trainer.accelerator'"),
    (
        ("--config", "quantize.yaml", "--model.wdth", "8"),
        "by plain_project.training.Classifier. Did you mean 'width'",
    ),
    (("--config", "quantize.yaml", "--model", "plain_project.training.Classifer"), "Did you mean 'Classifier'"),
    (("--config", "quantize.yaml", "--model-class", "plain_project.training.Clasifier"), "Did you mean 'Classifier'"),
    (("--config", "reciep.yaml"), "does not accept option 'reciep'. Did you mean 'recipe'"),
    (("--config", "quantize.yaml", "--output", "foreign"), "Choose another folder"),
    (("--config", "quantize.yaml", "--num_batches", "0"), "to be a positive integer, but got 0"),
    (("--config", "quantize.yaml", "--threads", "many"), "Expected `--threads` to be an integer, but got 'many'."),
    (("--config", "quantize.yaml", "--limits", "0.01"), "Expected `--limits` to be a mapping such as"),
    (("--config", "quantize.yaml", "--sensitivity", "maybe"), "Expected `--sensitivity` to be true or false"),
    (("--config", "quantize.yaml", "--recipe", "int8", "int8_dynamic"), "are a list: `--recipe '[int8,int8_dynamic]'`"),
    (("--config", "quantize.yaml", "--data", "null"), "(`--data` on the command line), or `train_dataloaders=`"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_told_in_few_words_with_an_exit_code_of_their_own(
    arguments: tuple[str, ...], message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = (EXAMPLE / "quantize.yaml").read_text()
    (project / "broken.yaml").write_text("[1, 2")
    (project / "plain.yaml").write_text(yaml.safe_dump({"model": {"width": 8}}))
    (project / "extra.yaml").write_text(f"{classes}patience: 3\n")
    (project / "reciep.yaml").write_text(f"{classes}reciep: int8\n")
    (project / "foreign.yaml").write_text(classes.replace("plain_project.training.C", "nowhere.C"))
    torch.save({"net.0.weight": torch.zeros(1)}, project / "weights.ckpt")
    (project / "foreign").mkdir(exist_ok=True)
    (project / "foreign" / "notes.txt").write_text("mine")

    assert run_in(project, "quantize", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err
    # Of a slip of the pen nobody's main.py is to blame.
    assert not ("Did you mean" in captured.err and "main.py" in captured.err)
    assert "usage:" not in captured.err
