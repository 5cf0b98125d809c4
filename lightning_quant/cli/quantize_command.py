"""LightningCLI with `quantize`, `sweep` and `inspect`: a user's own model and data classes, after training."""

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_quant.arguments.choice import did_you_mean
from lightning_quant.arguments.names import Engine, Recipes, Runtime, SeveralRecipes, SeveralRuntimes
from lightning_quant.callbacks import PostTrainingQuantization
from lightning_quant.capture.checkpoint import load_weights, read_checkpoint
from lightning_quant.doors.settings import CallbackSettings, documented
from lightning_quant.errors import QuantizationError
from lightning_quant.machine.disk import scratch_folder
from lightning_quant.report.limits import NO_LIMITS, Limits, missed_limits

OWN_SUBCOMMANDS = ("quantize", "sweep", "inspect")
"""What `QuantizationCLI` adds to LightningCLI."""
SWEPT = ("int8", "int8_accurate", "int8_dynamic", "int8_weight_only", "int4_weights")
"""What `sweep` compares where nothing is said."""


class Quantizing:
    """What a Trainer class gets: methods that LightningCLI reads its subcommands' arguments from."""

    @documented(CallbackSettings, output="output_dir")
    def quantize(  # noqa: D417  `documented` adds the shared ones
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        recipe: SeveralRecipes | Recipes | dict[str, Any] = "int8",
        runtime: SeveralRuntimes | Runtime = "onnxruntime",
        output: str | os.PathLike[str] | None = None,
        module: str | None = None,
        include: str | list[str] | tuple[str, ...] = ("*",),
        exclude: str | list[str] | tuple[str, ...] = (),
        num_batches: int = 32,
        evaluate: bool = True,
        threads: int | None = None,
        sensitivity: bool = False,
        engine: Engine = "auto",
        trust: bool = False,
        weights_only: bool | None = None,
        limits: Limits | dict[str, Any] | None = None,
        objective: str | None = None,
        max_validations: int | None = None,
        time_budget_s: float | None = None,
        show_samples: bool = True,
    ) -> Any:
        """Quantize a trained checkpoint and write the artifact, evaluated with the model's own validation.

        Args:
            model: the LightningModule.
            datamodule: its data.
            ckpt_path: any checkpoint of the model.
            num_batches: training batches to calibrate with.
            trust: load more of the checkpoint than tensors and plain values, which runs code of whoever wrote it.
            weights_only: false is `trust`, as in `fit`.
        """
        shared = CallbackSettings.among(locals())
        if ckpt_path is None:
            raise QuantizationError("Expected `--ckpt_path` to name a trained checkpoint, but got none.")
        callback = PostTrainingQuantization(**shared, output_dir=output, calibration={"num_batches": num_batches})
        options = {"trust_checkpoint": trust or weights_only is False, **_options(self)}
        return callback.quantize_checkpoint(ckpt_path, model, datamodule, **options)

    @documented(CallbackSettings, output="output_dir")
    def sweep(  # noqa: D417  `documented` adds the shared ones
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        recipe: SeveralRecipes | Recipes | None = None,
        runtime: SeveralRuntimes | Runtime | None = None,
        output: str | os.PathLike[str] | None = None,
        module: str | None = None,
        include: str | list[str] | tuple[str, ...] = ("*",),
        exclude: str | list[str] | tuple[str, ...] = (),
        num_batches: int = 32,
        evaluate: bool = True,
        threads: int | None = None,
        trust: bool = False,
        weights_only: bool | None = None,
        limits: Limits | dict[str, Any] | None = None,
        objective: str | None = None,
    ) -> Any:
        """Quantize a trained checkpoint with several recipes or for several runtimes, and compare what comes of it.

        Args:
            model: the LightningModule.
            datamodule: its data.
            ckpt_path: any checkpoint of the model.
            recipe: names or dicts of fields; int8, int8_accurate, int8_dynamic, int8_weight_only and int4_weights by
                default.
            runtime: names; onnxruntime by default.
            num_batches: training batches to calibrate with.
            trust: load more of the checkpoint than tensors and plain values, which runs code of whoever wrote it.
            weights_only: false is `trust`, as in `fit`.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        given["recipe"] = list(SWEPT) if recipe is None else recipe if isinstance(recipe, list | tuple) else [recipe]
        given["runtime"] = runtime if isinstance(runtime, list | tuple) else [runtime or "onnxruntime"]
        return self.quantize(**given)

    @documented(CallbackSettings)
    def inspect(  # noqa: D417  `documented` adds the shared ones
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        recipe: Recipes | dict[str, Any] = "int8",
        runtime: Runtime = "onnxruntime",
        module: str | None = None,
        include: str | list[str] | tuple[str, ...] = ("*",),
        exclude: str | list[str] | tuple[str, ...] = (),
        trust: bool = False,
        weights_only: bool | None = None,
    ) -> Any:
        """Plan what would be quantized and why the rest would not, before any training.

        Args:
            model: the LightningModule.
            datamodule: its data.
            ckpt_path: a checkpoint of the model, whose hyperparameters and weights are taken; not needed.
            trust: load more of the checkpoint than tensors and plain values, which runs code of whoever wrote it.
            weights_only: false is `trust`, as in `fit`.
        """
        shared = CallbackSettings.among(locals())
        if ckpt_path is not None:
            load_weights(model, ckpt_path, trust=trust or weights_only is False)
        with scratch_folder() as folder:
            callback = Inspection(**shared, output_dir=folder / "none")
            options: dict[str, Any] = {"max_epochs": 0, "callbacks": [callback], "devices": 1}
            Trainer(**_options(self), **options, **_QUIET).fit(model, datamodule=datamodule)
            prepared = callback.require_prepared()
            shapes = [list(tensor.shape) for tensor in prepared.tensors]
            return prepared.plan, dict(zip(prepared.spec.names, shapes, strict=True))


class QuantizationCLI(LightningCLI):
    """LightningCLI whose users can say `python main.py quantize --ckpt_path best.ckpt` beside fit, validate and test.

    Attributes:
        result: what the subcommand made: an `Artifact` of `quantize`, a `Plan` of `inspect`.
        missed: limits that the artifact does not keep to, in words.
        captured: name of every input of the captured call to its shape, after `inspect`.
    """

    result: Any = None
    missed: tuple[str, ...] = ()
    captured: Mapping[str, list[int]] = MappingProxyType({})

    def __init__(self, *args: Any, trainer_class: type[Trainer] = Trainer, **kwargs: Any) -> None:
        if not isinstance(trainer_class, type):
            raise QuantizationError("Expected `trainer_class` to be a class of Trainer, but got a function.")
        extended = type(trainer_class.__name__, (trainer_class, Quantizing), {})
        super().__init__(*args, **{**kwargs, "trainer_class": extended})

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """Return LightningCLI's subcommands and ours, with the arguments that are not options."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in OWN_SUBCOMMANDS}}

    @override
    def _parse_ckpt_path(self) -> None:
        """Take hyperparameters from a checkpoint that LightningCLI did not write, too: they lack the class."""
        name = self.config.get("subcommand")
        path = self.config[name].get("ckpt_path") if name in OWN_SUBCOMMANDS else None
        if path is None:
            super()._parse_ckpt_path()
            return
        trust = bool(self.config[name].get("trust")) or self.config[name].get("weights_only") is False
        with _told(name):
            saved = read_checkpoint(path, trust=trust)
        # Classes that a checkpoint names would be imported; the configuration has them, too.
        values = {k: v for k, v in saved.get("hyper_parameters", {}).items() if trust or not _names_class(v)}
        class_path = getattr(self.config[name].model, "class_path", None)
        accepted = set(
            inspect.signature((import_class(class_path) if class_path else self._model_class).__init__).parameters
        )
        arguments = {key: value for key, value in values.items() if key in accepted}
        known: dict[str, Any] = {"class_path": class_path, "init_args": arguments} if class_path else arguments
        if arguments:
            self.config = self.parser.parse_object({name: {"model": known}}, self.config)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Run a subcommand; what ours refuse is a line on standard error and exit code 2."""
        with _told(subcommand) if subcommand in OWN_SUBCOMMANDS else contextlib.nullcontext():
            super()._run_subcommand(subcommand)
        if self.missed:
            self.end_missed()

    def end_missed(self) -> None:
        """End with exit code 1 and a line for every limit that was missed."""
        for failure in self.missed:
            print(f"{Path(sys.argv[0]).name} quantize: {failure}", file=sys.stderr)
        sys.exit(1)

    def quantize(self, **arguments: Any) -> None:
        """Run the subcommand, and keep its artifact and the limits that this misses."""
        self.result = self.trainer.quantize(**arguments)  # type: ignore[attr-defined]
        self.missed = tuple(missed_limits(self.result, NO_LIMITS))

    def sweep(self, **arguments: Any) -> None:
        """Run the subcommand, and keep the recommended artifact, the table of all, and the limits that it misses."""
        self.result = self.trainer.sweep(**arguments)  # type: ignore[attr-defined]
        self.missed = tuple(missed_limits(self.result, NO_LIMITS))

    def inspect(self, **arguments: Any) -> None:
        """Run the subcommand, and keep its plan and what it was made from."""
        self.result, self.captured = self.trainer.inspect(**arguments)  # type: ignore[attr-defined]


@contextlib.contextmanager
def _told(subcommand: str) -> Iterator[None]:
    """End with a line on standard error and exit code 2 where this package refuses."""
    try:
        yield
    except (QuantizationError, MisconfigurationException) as error:
        print(f"{Path(sys.argv[0]).name} {subcommand}: {error}", file=sys.stderr)
        sys.exit(2)


class Inspection(PostTrainingQuantization):
    """Post-training quantization that ends with the plan."""

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


def _names_class(value: Any) -> bool:
    """Tell whether LightningCLI would import something for a value."""
    if isinstance(value, dict):
        return "class_path" in value or any(map(_names_class, value.values()))
    return isinstance(value, list | tuple) and any(map(_names_class, value))


def import_class(path: str) -> Any:
    """Return the class that an import path names.

    Raises:
        QuantizationError: there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        hint = did_you_mean(name, vars(sys.modules[module])) if module in sys.modules else ""
        raise QuantizationError(
            f"Expected an import path such as my_project.model.Classifier, but got {path!r}: {error}.{hint}"
        ) from error
