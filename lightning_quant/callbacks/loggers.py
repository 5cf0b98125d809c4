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
        return _drawn(self.prefix, self.report.figures())


def write_down(logger: Any, entry: Entry) -> None:
    """Write what a logger holds beside numbers, in its own way; hyperparameters and pictures where that is not known.

    Args:
        logger: one of Lightning's, of either of its names, or any other.
        entry: what there is to write.
    """
    kind = _kind(logger)
    _OWN.get(kind, _hyperparameters)(logger, entry)
    _write(logger, kind, {f"{entry.prefix}/report": entry.report.to_markdown()}, entry.figures(), entry.step)


def write_table(logger: Any, key: str, text: str, figures: Mapping[str, Callable[[], Any]], step: int) -> None:
    """Write a table over several artifacts, and its figures, where a logger takes texts and pictures.

    Args:
        logger: one of Lightning's, or any other.
        key: what the table is found by.
        text: the table as Markdown.
        figures: name to what draws a picture with matplotlib.
        step: the Trainer's global step.
    """
    _write(logger, _kind(logger), {key: text}, _drawn(key, figures), step)


def _kind(logger: Any) -> str:
    """Return the name of the known class that a logger is of, from either of Lightning's packages; empty for others."""
    return next((base.__name__ for base in type(logger).__mro__ if base.__name__ in _TEXT), "")


def _drawn(prefix: str, figures: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Return name to picture; none where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    return {f"{prefix}/{name}": draw() for name, draw in figures.items()}


def _write(logger: Any, kind: str, texts: Mapping[str, str], figures: Mapping[str, Any], step: int) -> None:
    for key, text in texts.items() if kind else ():
        _TEXT[kind](logger, key, text, step)
    show = _FIGURE.get(kind) or (_logged_image if callable(getattr(logger, "log_image", None)) else None)
    if show is not None:
        for key, figure in figures.items():
            show(logger, key, figure, step)


def _hyperparameters(logger: Any, entry: Entry) -> None:
    logger.log_hyperparams(entry.params)


def _tensorboard(logger: Any, entry: Entry) -> None:
    # TensorBoard shows the first record of hyperparameters alone, so that the user's own stay where there are any; ours
    # stand there as text, too. Without metrics it would reset `hp_metric`.
    metrics = {f"{entry.prefix}/size_ratio": entry.report.scalars(entry.prefix)[f"{entry.prefix}/size_ratio"]}
    logger.log_hyperparams({**logger.hparams, **entry.params}, metrics, entry.step)
    table = text_table(("hyperparameter", "value"), [(name, str(value)) for name, value in entry.params.items()])
    logger.experiment.add_text(f"{entry.prefix}/hyperparameters", table, entry.step)


def _wandb(logger: Any, entry: Entry) -> None:
    logger.log_hyperparams(entry.params)
    logger.experiment.summary.update(entry.report.scalars(entry.prefix))
    rows = entry.report.to_dict()["plan"]["rows"]
    columns = ["name", "kind", "action", "reason", "macs", "weights"]
    table = [[row[column] for column in columns] for row in rows]
    logger.log_table(f"{entry.prefix}/plan", columns, table, step=entry.step)
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


def _logged_image(logger: Any, key: str, figure: Any, step: int) -> None:
    """Show a picture by the method that W&B's logger, and others after its pattern, have."""
    logger.log_image(key, [figure], step=step)


_OWN: dict[str, Callable[[Any, Entry], None]] = {
    "TensorBoardLogger": _tensorboard,
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
}
# How a logger takes a text of Markdown, and a picture, by a key.
_TEXT: dict[str, Callable[[Any, str, str, int], Any]] = {
    "TensorBoardLogger": lambda logger, key, text, step: logger.experiment.add_text(key, text, step),
    "WandbLogger": lambda logger, key, text, step: logger.log_text(
        key, [f"{key.rpartition('/')[2]}.md"], [[text]], step=step
    ),
    "MLFlowLogger": lambda logger, key, text, step: logger.experiment.log_text(logger.run_id, text, f"{key}.md"),
    "CometLogger": lambda logger, key, text, step: logger.experiment.log_text(text, step, {"name": key}),
}
_FIGURE: dict[str, Callable[[Any, str, Any, int], Any]] = {
    "TensorBoardLogger": lambda logger, key, figure, step: logger.experiment.add_figure(key, figure, step),
    "MLFlowLogger": lambda logger, key, figure, step: logger.experiment.log_figure(logger.run_id, figure, f"{key}.png"),
    "CometLogger": lambda logger, key, figure, step: logger.experiment.log_figure(key, figure, step=step),
}
