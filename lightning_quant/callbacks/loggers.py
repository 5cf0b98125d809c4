"""What each logger holds beside numbers: hyperparameters, the report as text, pictures, and the artifact itself."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_quant.artifact.artifact import Artifact
from lightning_quant.machine.disk import scratch_folder
from lightning_quant.report.report import Report
from lightning_quant.terminal.tables import text_table


@dataclass(frozen=True)
class Entry:
    """What is to be written down of one artifact.

    Attributes:
        prefix: what its keys begin with.
        step: the Trainer's global step.
        hyperparameters: what it was made with, by name.
        report: what was measured.
        artifact: the folder.
    """

    prefix: str
    step: int
    hyperparameters: dict[str, Any]
    report: Report
    artifact: Artifact

    @property
    def params(self) -> dict[str, Any]:
        """Hyperparameters under their prefix."""
        return {f"{self.prefix}/{name}": value for name, value in self.hyperparameters.items()}

    def figures(self) -> dict[str, Any]:
        """Return name to picture; none where matplotlib is not installed."""
        if importlib.util.find_spec("matplotlib") is None:
            return {}
        return {f"{self.prefix}/{name}": draw() for name, draw in self.report.figures().items()}


def write_down(logger: Any, entry: Entry) -> None:
    """Write what a logger holds beside numbers, in its own way; hyperparameters alone where that is not known.

    Args:
        logger: one of Lightning's, of either of its names, or any other.
        entry: what there is to write.
    """
    write = next((_WAYS[base.__name__] for base in type(logger).__mro__ if base.__name__ in _WAYS), None)
    if write is None:
        logger.log_hyperparams(entry.params)
    else:
        write(logger, entry)


def write_table(logger: Any, key: str, text: str, figures: Mapping[str, Callable[[], Any]], step: int) -> None:
    """Write a table over several artifacts, and its figures, where a logger takes texts and pictures.

    Args:
        logger: one of Lightning's, or any other, which gets nothing.
        key: what the table is found by.
        text: the table as Markdown.
        figures: name to what draws a picture with matplotlib.
        step: the Trainer's global step.
    """
    kind = next((base.__name__ for base in type(logger).__mro__ if base.__name__ in _WAYS), "")
    drawn = {} if importlib.util.find_spec("matplotlib") is None else {f"{key}/{n}": d() for n, d in figures.items()}
    if kind == "TensorBoardLogger":
        logger.experiment.add_text(key, text, step)
        for name, figure in drawn.items():
            logger.experiment.add_figure(name, figure, step)
    elif kind == "WandbLogger":
        logger.log_text(key, ["sweep.md"], [[text]], step=step)
        for name, figure in drawn.items():
            logger.log_image(name, [figure], step=step)
    elif kind == "MLFlowLogger":
        logger.experiment.log_text(logger.run_id, text, f"{key}.md")
        for name, figure in drawn.items():
            logger.experiment.log_figure(logger.run_id, figure, f"{name}.png")


def _tensorboard(logger: Any, entry: Entry) -> None:
    # TensorBoard shows the first record of hyperparameters alone, so that the user's own stay where there are any; ours
    # stand there as text, too. Without metrics it would reset `hp_metric`.
    metrics = {f"{entry.prefix}/size_ratio": entry.report.scalars(entry.prefix)[f"{entry.prefix}/size_ratio"]}
    logger.log_hyperparams({**logger.hparams, **entry.params}, metrics, entry.step)
    table = text_table(("hyperparameter", "value"), [(name, str(value)) for name, value in entry.params.items()])
    logger.experiment.add_text(f"{entry.prefix}/hyperparameters", table, entry.step)
    logger.experiment.add_text(f"{entry.prefix}/report", entry.report.to_markdown(), entry.step)
    for name, figure in entry.figures().items():
        logger.experiment.add_figure(name, figure, entry.step)


def _wandb(logger: Any, entry: Entry) -> None:
    logger.log_hyperparams(entry.params)
    logger.experiment.summary.update(entry.report.scalars(entry.prefix))
    rows = entry.report.to_dict()["plan"]["rows"]
    columns = ["name", "kind", "action", "reason", "macs", "weights"]
    table = [[row[column] for column in columns] for row in rows]
    logger.log_table(f"{entry.prefix}/plan", columns, table, step=entry.step)
    logger.log_text(f"{entry.prefix}/report", ["report.md"], [[entry.report.to_markdown()]], step=entry.step)
    for name, figure in entry.figures().items():
        logger.log_image(name, [figure], step=entry.step)
    if logger._log_model:
        import wandb

        name = f"{entry.prefix.replace('/', '-')}-{logger.experiment.id}"
        saved = wandb.Artifact(name, type="model", metadata=entry.hyperparameters)
        saved.add_dir(str(entry.artifact.path))
        logger.experiment.log_artifact(saved, aliases=["latest"])


def _mlflow(logger: Any, entry: Entry) -> None:
    logger.log_hyperparams(entry.params)
    client, run = logger.experiment, logger.run_id
    for name in ("recipe", "runtime"):
        client.set_tag(run, f"{entry.prefix}/{name}", entry.hyperparameters[name])
    client.log_text(run, entry.report.to_markdown(), f"{entry.prefix}/report.md")
    for name, figure in entry.figures().items():
        client.log_figure(run, figure, f"{name}.png")
    if not logger._log_model:
        return
    client.log_artifacts(run, str(entry.artifact.path), f"{entry.prefix}/artifact")
    if entry.artifact.model_path.suffix == ".onnx" and importlib.util.find_spec("pandas") is not None:
        import mlflow.onnx
        import onnx

        with scratch_folder() as folder:
            flavour = folder / "model"
            mlflow.onnx.save_model(onnx.load(entry.artifact.model_path), flavour)
            client.log_artifacts(run, str(flavour), f"{entry.prefix}/mlflow_model")


_WAYS: dict[str, Callable[[Any, Entry], None]] = {
    "TensorBoardLogger": _tensorboard,
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
}
