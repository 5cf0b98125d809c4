"""LightningCLI with the subcommands `quantize` and `inspect`: a user's own model and data classes, after training."""

import importlib
import inspect
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from typing_extensions import override

from lightning_quant.callbacks import PostTrainingQuantization
from lightning_quant.errors import QuantizationError


class _Quantizing:
    """What a Trainer class gets: methods that LightningCLI reads its subcommands' arguments from."""

    def quantize(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        recipe: str = "int8",
        runtime: str = "onnxruntime",
        output: str = "quantized",
        module: str | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        num_batches: int = 32,
        evaluate: bool = True,
        threads: int | None = None,
        sensitivity: bool = False,
        engine: str = "auto",
    ) -> Any:
        """Quantize a trained checkpoint and write the artifact, evaluated with the model's own validation.

        Args:
            model: the LightningModule.
            datamodule: its data.
            ckpt_path: any checkpoint of the model.
            recipe: numerics, by name.
            runtime: where the artifact will run; "auto" takes the fastest installed one whose parity holds.
            output: the artifact's folder.
            module: name of the module to quantize; found by itself when left out.
            include: fnmatch patterns on qualified names and layer types of what may be quantized.
            exclude: likewise, of what stays float.
            num_batches: training batches to calibrate with.
            evaluate: whether to run the validation loop on float, simulated and exported model.
            threads: for the latencies in the report.
            sensitivity: whether the report says which operator costs what.
            engine: whose kernels run on runtime "torch"; "auto" takes the fastest whose parity holds.
        """
        if ckpt_path is None:
            raise QuantizationError("Expected `--ckpt_path` to name a trained checkpoint, but got none.")
        callback = PostTrainingQuantization(
            recipe,
            runtime,
            module=module,
            output_dir=output,
            include=include or ["*"],
            exclude=exclude or [],
            calibration={"num_batches": num_batches},
            evaluate=evaluate,
            threads=threads,
            sensitivity=sensitivity,
            engine=engine,
        )
        return callback.quantize_checkpoint(ckpt_path, model, datamodule, **_options(self))

    def inspect(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        recipe: str = "int8",
        runtime: str = "onnxruntime",
        module: str | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> Any:
        """Plan what would be quantized and why the rest would not, before any training.

        Args:
            model: the LightningModule.
            datamodule: its data.
            recipe: numerics, by name.
            runtime: where the artifact would run.
            module: name of the module to quantize; found by itself when left out.
            include: fnmatch patterns on qualified names and layer types of what may be quantized.
            exclude: likewise, of what stays float.
        """
        with tempfile.TemporaryDirectory() as folder:
            callback = _PlanOnly(
                recipe,
                runtime,
                module=module,
                output_dir=Path(folder) / "none",
                include=include or ["*"],
                exclude=exclude or [],
            )
            options: dict[str, Any] = {"max_epochs": 0, "callbacks": [callback], "devices": 1}
            Trainer(**_options(self), **options, **_QUIET).fit(model, datamodule=datamodule)
            return callback.require_prepared().plan


class QuantizationCLI(LightningCLI):
    """LightningCLI whose users can say `python main.py quantize --ckpt_path best.ckpt` beside fit, validate and test.

    Attributes:
        result: what the subcommand returned: an `Artifact` of `quantize`, a `Plan` of `inspect`.
    """

    result: Any = None

    def __init__(self, *args: Any, trainer_class: type[Trainer] = Trainer, **kwargs: Any) -> None:
        if not isinstance(trainer_class, type):
            raise QuantizationError("Expected `trainer_class` to be a class of Trainer, but got a function.")
        extended = type(trainer_class.__name__, (trainer_class, _Quantizing), {})
        super().__init__(*args, **{**kwargs, "trainer_class": extended})

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """Return LightningCLI's subcommands, `quantize` and `inspect`, with the arguments that are not options."""
        return {**LightningCLI.subcommands(), "quantize": {"model", "datamodule"}, "inspect": {"model", "datamodule"}}

    @override
    def _parse_ckpt_path(self) -> None:
        """Take hyperparameters from a checkpoint that LightningCLI did not write, too: they lack the class."""
        chosen = self.config[self.config["subcommand"]]
        path = chosen.get("ckpt_path")
        model = chosen.get("model")
        if not path or not Path(path).is_file() or not getattr(model, "class_path", None):
            super()._parse_ckpt_path()
            return
        saved = torch.load(path, map_location="cpu", weights_only=False).get("hyper_parameters", {})
        if "_class_path" in saved:
            super()._parse_ckpt_path()
            return
        accepted = set(inspect.signature(_import(model.class_path).__init__).parameters)
        init_args = {name: value for name, value in saved.items() if name in accepted}
        known = {"class_path": model.class_path, "init_args": init_args}
        self.config = self.parser.parse_object({self.config["subcommand"]: {"model": known}}, self.config)

    def quantize(self, **arguments: Any) -> None:
        """Run the subcommand and keep its artifact."""
        self.result = self.trainer.quantize(**arguments)  # type: ignore[attr-defined]

    def inspect(self, **arguments: Any) -> None:
        """Run the subcommand and keep its plan."""
        self.result = self.trainer.inspect(**arguments)  # type: ignore[attr-defined]


class _PlanOnly(PostTrainingQuantization):
    """Ends with the plan."""

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit ends: nothing is made."""


_QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
)


def _options(trainer: Any) -> dict[str, Any]:
    """Return what of the configured Trainer also holds for the one that quantizes."""
    names = ("limit_train_batches", "limit_val_batches")
    return {"accelerator": trainer.strategy.root_device.type, **{name: getattr(trainer, name) for name in names}}


def run_subcommand(name: str, config: str | None, classes: dict[str, str], arguments: list[str]) -> Any:
    """Run a subcommand of `QuantizationCLI` on the classes that a configuration or its caller names.

    Args:
        name: of the subcommand.
        config: file that LightningCLI wrote or reads; `class_path`s in it name the classes.
        classes: "model" and "data" to an import path, for configurations that name no classes.
        arguments: the rest of the command line.
    """
    given = {kind: _import(path) for kind, path in classes.items()}
    options = ["--config", config] if config is not None else []
    # LightningCLI warns of arguments given beside those of the command.
    before, sys.argv = sys.argv, ["lightning-quant", name, *options, *arguments]
    try:
        cli = QuantizationCLI(
            given.get("model"),
            given.get("data"),
            save_config_callback=None,
            trainer_defaults={"logger": False, "enable_progress_bar": False},
            seed_everything_default=0,
        )
    finally:
        sys.argv = before
    return cli.result


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise QuantizationError(
            f"Expected an import path such as my_project.model.Classifier, but got {path!r}: {error}."
        ) from error
