"""What real loggers hold after a fit, offline."""

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from features import feature
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning_models import Classifier, WithoutValidation, fit, seeded

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.callbacks.loggers import write_table
from lightning_quant.search.pareto import Point
from lightning_quant.search.sweep import swept

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("unmeasured"),
]


def quantized(tmp_path: Path, logger: Any, recipe: str = "int8_weight_only", runtime: str = "torch") -> Any:
    callback = PostTrainingQuantization(recipe, runtime, output_dir=tmp_path / "artifact", threads=1, evaluate=False)
    return fit(seeded(WithoutValidation), callback, logger=logger, max_epochs=1)


def test_csv_holds_scalars_and_hyperparameters(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    quantized(tmp_path, logger)
    folder = Path(logger.log_dir)

    assert "quant/size_ratio" in (folder / "metrics.csv").read_text()
    assert "quant/recipe: int8_weight_only" in (folder / "hparams.yaml").read_text()


@pytest.mark.parametrize("own", [{"width": 8}, {}])
def test_tensorboard_holds_text_pictures_and_hyperparameters_beside_the_users_own(
    own: dict[str, int], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path / "logs")
    if own:
        logger.log_hyperparams(own, {"hp_metric": 0.5})
    callback = QuantizationAwareTraining(output_dir=tmp_path / "artifact", threads=1, sensitivity=True)
    trainer = fit(seeded(Classifier), callback, logger=logger, max_epochs=2)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()

    assert events.Scalars("quant/size_ratio")[-1].step == trainer.global_step
    assert "quant/sensitivity" in events.Tags()["images"]
    (text,) = events.Tensors("quant/hyperparameters/text_summary")
    assert b"quant/schedule/fake_quantize" in text.tensor_proto.string_val[0]
    (text,) = events.Tensors("quant/report/text_summary")
    assert text.tensor_proto.string_val[0].startswith(b"# int8 on onnxruntime")
    shown = b"".join(m.plugin_data.content for name, m in events.summary_metadata.items() if "hparams" in name)
    assert (b"width" if own else b"quant/schedule/fake_quantize") in shown
    if own:
        assert [event.value for event in events.Scalars("hp_metric")] == [0.5]


def test_mlflow_holds_params_tags_report_and_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("run", tracking_uri=f"file:{tmp_path / 'logs'}", log_model=True)
    quantized(tmp_path, logger, "int8_dynamic", "onnxruntime")
    client, run = logger.experiment, logger.experiment.get_run(logger.run_id)

    assert run.data.params["quant/recipe"] == "int8_dynamic"
    assert run.data.tags["quant/runtime"] == "onnxruntime"
    assert run.data.metrics["quant/size_ratio"] > 0
    assert client.download_artifacts(logger.run_id, "quant/report.md", str(tmp_path)).endswith("report.md")
    names = {item.path for item in client.list_artifacts(logger.run_id, "quant/artifact")}
    assert {"quant/artifact/model.onnx", "quant/artifact/manifest.json"} <= names
    assert "quant/mlflow_model/MLmodel" in {i.path for i in client.list_artifacts(logger.run_id, "quant/mlflow_model")}


def test_wandb_holds_summary_table_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    logged: dict[str, Any] = {}
    saved: list[Any] = []
    logger = WandbLogger("run", save_dir=tmp_path / "logs", offline=True)
    logger._log_model = "all"  # which Lightning refuses offline, where nothing is sent
    run = logger.experiment
    monkeypatch.setattr(type(run), "log_artifact", lambda _, item, **__: saved.append(item))
    log = type(run).log
    monkeypatch.setattr(type(run), "log", lambda self, data, **kw: (logged.update(data), log(self, data, **kw))[1])
    quantized(tmp_path, logger)
    config, summary = dict(run.config), run.summary["quant/size_ratio"]
    wandb.finish()

    assert config["quant/runtime"] == "torch"
    assert math.isclose(summary, logged["quant/size_ratio"])
    assert logged["quant/plan"].columns[:2] == ["name", "kind"]
    assert logged["quant/report"].data[0][0].startswith("# int8_weight_only on torch")
    (artifact,) = [item for item in saved if item.name.startswith("quant-")]
    assert "manifest.json" in artifact.manifest.entries


def test_a_logger_that_fails_loses_neither_artifact_nor_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    class Broken(CSVLogger):
        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("the service is away")

    trainer = quantized(tmp_path, [Broken(tmp_path / "logs"), CSVLogger(tmp_path / "others")])

    assert trainer.state.finished
    assert json.loads((tmp_path / "artifact" / "manifest.json").read_text())["report"]
    assert any("Broken did not take all of the report" in str(item.message) for item in recwarn)


def table_in(logger: Any, folder: Path) -> None:
    """Write the table and the figure of a sweep as its callback does."""
    artifacts = [Artifact(folder / name, {"recipe": name, "runtime": "torch"}) for name in ("int8", "float16")]
    sizes, metrics = (5, 10), ({"val_acc": 0.9}, {"val_acc": 0.95})
    points = [
        Point(a.path.name, a.path.name, "torch", a, "", m, size_bytes=n)
        for a, n, m in zip(artifacts, sizes, metrics, strict=True)
    ]
    made = swept(folder, points, {"val_acc": True})
    write_table(logger, "quant/sweep/table", made.text(), made.figures(), 7)


@feature("Several artifacts", "the table and the figure in every logger that takes texts and pictures", only="PTQ")
def test_the_table_of_a_sweep_is_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path / "logs")
    table_in(logger, tmp_path)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (text,) = events.Tensors("quant/sweep/table/text_summary")
    assert text.tensor_proto.string_val[0].startswith(b"# 2 artifacts of one training")
    (image,) = events.Images("quant/sweep/table/pareto")
    assert (image.step, text.step) == (7, 7)


def test_the_table_of_a_sweep_is_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("run", tracking_uri=f"file:{tmp_path / 'logs'}")
    table_in(logger, tmp_path)
    client = logger.experiment
    text = Path(client.download_artifacts(logger.run_id, "quant/sweep/table.md", str(tmp_path))).read_text()
    assert text.startswith("# 2 artifacts of one training")
    assert "quant/sweep/table/pareto.png" in {
        item.path for item in client.list_artifacts(logger.run_id, "quant/sweep/table")
    }


@pytest.mark.parametrize("kind", ["WandbLogger", "CometLogger", "AnotherLogger"])
def test_the_table_of_a_sweep_is_in_loggers_of_other_services(kind: str, tmp_path: Path) -> None:
    logger = type(kind, (mock.MagicMock,), {})()
    table_in(logger, tmp_path)
    calls = [*logger.method_calls]
    names = [call[0] for call in calls]
    assert (
        names
        == {
            "WandbLogger": ["log_text", "log_image"],
            "CometLogger": ["experiment.log_text", "experiment.log_figure"],
            "AnotherLogger": ["log_image"],
        }[kind]
    )
    assert "quant/sweep/table/pareto" in calls[-1].args
    if len(calls) > 1:
        assert "# 2 artifacts of one training" in repr(calls[0].args)
        assert "quant/sweep/table" in repr(calls[0])


def test_a_logger_without_texts_and_pictures_gets_none(tmp_path: Path) -> None:
    class Numbers:
        """Takes numbers alone."""

    table_in(Numbers(), tmp_path)
