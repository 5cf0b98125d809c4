"""The examples and the README do what they say."""

import re
from pathlib import Path
from typing import Any

import audio_classifier
import cli
import lenet_all_ways
import onnx
import pytest
import quickstart
import yaml

import lightning_quant as lq
from lightning_quant.artifact.artifact import read

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NO_WORKERS_OR_OVERWRITE = "ignore:.*:UserWarning:lightning"


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["cli.py"])


@pytest.mark.filterwarnings(NO_WORKERS_OR_OVERWRITE)
def test_quickstart_loses_at_most_two_images_and_runs_in_integers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "OUTPUT", tmp_path)
    monkeypatch.setattr(quickstart, "EPOCHS", 6)
    quickstart.main()
    printed = capsys.readouterr().out
    wrong = {name: int(number) for name, number in re.findall(r"^  (\S.*?)\s{2,}(\d+)$", printed, re.MULTILINE)}
    assert set(wrong) == {"float", "post-training quantization, int8 file", "quantization-aware, int8 file"}
    assert max(wrong.values()) <= wrong["float"] + 2
    for name in ("ptq", "qat"):
        report = read(tmp_path / name).report
        assert report["still_float"] == {}
        assert report["plan"]["coverage"] == 1.0
        assert report["operators"]["QLinearConv"] == 4
        assert report["operators"]["QGemm"] == 1
        assert not any("parity" in warning for warning in report["warnings"])


@pytest.mark.filterwarnings(NO_WORKERS_OR_OVERWRITE)
def test_yaml_configures_the_callback_fully(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shorter = ["--trainer.max_epochs", "3", "--trainer.limit_train_batches", "4"]
    started = cli.main(["fit", "--config", str(ROOT / "examples/qat.yaml"), *shorter])
    (callback,) = [c for c in started.trainer.callbacks if isinstance(c, lq.QuantizationAwareTraining)]
    assert callback.schedule == lq.Schedule(fake_quantize=2, freeze_observers=8, unit="epochs")
    assert callback.module == "net"
    assert lq.load(tmp_path / "quantized/digits").signature.inputs[0].shape == ("batch", 1, 8, 8)


def test_print_config_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(config: Path) -> str:
        with pytest.raises(SystemExit):
            cli.main(["fit", "--config", str(config), "--print_config"])
        return capsys.readouterr().out

    first = printed(ROOT / "examples/qat.yaml")
    (tmp_path / "printed.yaml").write_text(first)
    assert yaml.safe_load(printed(tmp_path / "printed.yaml")) == yaml.safe_load(first)
    (callback,) = yaml.safe_load(first)["trainer"]["callbacks"]
    asked = yaml.safe_load((ROOT / "examples/qat.yaml").read_text())["trainer"]["callbacks"][0]["init_args"]
    given = {name: value for name, value in asked.items() if name != "schedule"}
    assert {name: callback["init_args"][name] for name in given} == given
    assert asked["schedule"].items() <= callback["init_args"]["schedule"].items()


@pytest.mark.filterwarnings(NO_WORKERS_OR_OVERWRITE)
def test_readme_yaml_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "callbacks" in b]
    (tmp_path / "readme.yaml").write_text(block)
    quick = ["--trainer.max_epochs=3", "--trainer.limit_train_batches=4", "--trainer.accelerator=cpu"]
    cli.main(
        ["fit", "--config", "readme.yaml", *quick, "--trainer.logger=false", "--trainer.enable_checkpointing=true"]
    )
    rows = {row["name"]: row["reason"] for row in read(tmp_path / "quantized/digits").plan["rows"]}
    assert rows["0"] == 'excluded by "0"'


@pytest.mark.filterwarnings(NO_WORKERS_OR_OVERWRITE)
@pytest.mark.parametrize("page", ["README.md", pytest.param("examples/README.md", marks=pytest.mark.slow)])
def test_code_of_pages_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    for model in tmp_path.rglob("model.onnx"):
        onnx.checker.check_model(onnx.load(model))


@pytest.mark.slow
@pytest.mark.filterwarnings(NO_WORKERS_OR_OVERWRITE)
def test_lenet_in_every_precision_is_smaller_and_as_accurate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lenet_all_ways, "OUTPUT", tmp_path)
    monkeypatch.setattr(lenet_all_ways, "EPOCHS", 3)
    for name in ("bfloat16", "dynamic int8, ONNX Runtime"):
        monkeypatch.delitem(lenet_all_ways.AFTER_FIT, name)
    monkeypatch.delitem(lenet_all_ways.DURING_FIT, "static int8, QAT, qnnpack")
    lenet_all_ways.main()
    rows = _printed_rows(capsys.readouterr().out)
    assert list(rows) == ["float32, PyTorch", *lenet_all_ways.AFTER_FIT, *lenet_all_ways.DURING_FIT]
    float_bytes, float_accuracy = float(rows["float32, PyTorch"][0]), float(rows["float32, PyTorch"][1])
    for name, (num_bytes, accuracy, *_) in list(rows.items())[1:]:
        assert float(num_bytes) / float_bytes < (0.57 if "float16" in name else 0.40), name
        assert float(accuracy) >= float_accuracy - (0.05 if "QAT" in name else 0.01), name


@pytest.mark.parametrize("quantized", [audio_classifier.QUANTIZED[:1], pytest.param(None, marks=pytest.mark.slow)])
def test_audio_transformer_from_its_checkpoint(
    quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(audio_classifier, "QUANTIZED", quantized or audio_classifier.QUANTIZED)
    monkeypatch.setattr(audio_classifier, "EPOCHS", 1)
    audio_classifier.main(num_train=64, num_validation=64)
    rows = _printed_rows(capsys.readouterr().out)
    assert float(rows["int8_dynamic, torch"][1]) <= 0.27
    assert len(rows) == 2 + len(audio_classifier.QUANTIZED)
    assert all(abs(float(row[2]) - float(rows["original"][2])) <= 2 / 64 for row in rows.values())


def _printed_rows(printed: str) -> dict[str, list[str]]:
    """Return the cells of a printed table's rows by the first cell."""
    lines = [line.strip("| ").split("|") for line in printed.splitlines() if line.startswith("| ")]
    return {first.strip(): [cell.strip().replace(",", "") for cell in cells] for first, *cells in lines[1:]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_reference_networks_run_in_integers_to_the_bit(name: str, tmp_path: Path) -> None:
    import reference_models
    import torch

    torch.manual_seed(0)
    model = getattr(reference_models, name)()
    calibration = [torch.randn(2, 3, 224, 224) for _ in range(2)]
    with torch.no_grad():
        for images in calibration * 4:
            model(images)
    artifact = lq.quantize(model.eval(), calibration_data=calibration, output_dir=tmp_path, threads=1)
    operators = artifact.report["operators"]
    expected = {"resnet18": (20, 8), "mobilenet_v2": (52, 10)}[name]
    assert (operators["QLinearConv"], operators["QLinearAdd"]) == expected
    assert operators["QGemm"] == 1
    assert operators.get("QuantizeLinear", 0) <= 2
    assert operators.get("DequantizeLinear", 0) <= 2
    assert artifact.report["parity"]["worst_share"] == 1.0
    assert artifact.report["parity"]["artifact_db"] == "inf"
