"""What both callbacks share: their arguments, what they refuse before training, and what they do when fit ends."""

import time
import warnings
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_quant import artifact as artifacts
from lightning_quant import recipe as recipes
from lightning_quant import runtimes
from lightning_quant.artifact import Artifact
from lightning_quant.callbacks.training_data import capture_call
from lightning_quant.capture import Capture, find_module
from lightning_quant.errors import NoEffectWarning, QuantizationError
from lightning_quant.export import DynamicShapes, Quantizable, trial_export
from lightning_quant.graph.analyze import has_weights
from lightning_quant.graph.table import Selection
from lightning_quant.layers import has_layers
from lightning_quant.layerwise import quantize_layers
from lightning_quant.prepare import prepare
from lightning_quant.recipe import AnyRecipe, LayerRecipe
from lightning_quant.routing import resolve

_SINGLE_PROCESS = ("SingleDeviceStrategy",)


class QuantizationCallback(Callback):
    """Base of the callbacks; see `QuantizationAwareTraining` and `PostTrainingQuantization`."""

    def __init__(
        self,
        recipe: str | dict[str, Any] | AnyRecipe,
        runtime: str,
        *,
        module: str | None,
        output_dir: str | Path | None,
        include: list[str] | tuple[str, ...],
        exclude: list[str] | tuple[str, ...],
        example: Literal["train_batch", "example_input_array"],
        weights: Literal["last", "best"],
        evaluate: bool,
        limit_eval_batches: int | float | None,
        threads: int | None,
        dynamic_shapes: DynamicShapes | None,
    ) -> None:
        super().__init__()
        self.recipe = _refused_in_callback(recipes.get, recipe)
        self.runtime = runtime
        self.module = module
        self.output_dir = output_dir
        self.selection = Selection(tuple(include), tuple(exclude))
        self.example = example
        self.weights = weights
        self.evaluate = evaluate
        self.limit_eval_batches = limit_eval_batches
        self.threads = threads
        self.dynamic_shapes = dynamic_shapes
        for name, value, choices in (
            ("example", example, ("train_batch", "example_input_array")),
            ("weights", weights, ("last", "best")),
        ):
            if value not in choices:
                raise MisconfigurationException(f"Expected `{name}` to be one of {choices}, but got {value!r}.")
        # Known from fit start on, when the module exists on its device and its data can be read.
        self.prepared: Quantizable | None = None
        self.artifact: Artifact | None = None
        self.path = ""
        self.seconds: dict[str, float] = {}

    @property
    @override
    def state_key(self) -> str:
        identity = {"recipe": self.recipe.name, "module": self.module, "output_dir": str(self.output_dir)}
        return self._generate_state_key(runtime=self.runtime, **identity)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit begins: refuse what names alone can tell."""
        if stage == "fit":
            _refused_in_callback(self._check_names, trainer, pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit begins, after restore and device placement: capture, plan, and export once on trial."""
        _refused_in_callback(self._prepare, trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit ends, however it ends: give the module its own forward back."""
        if self.prepared is not None:
            self.prepared.detach()

    def folder(self, trainer: Trainer) -> Path:
        """Return the artifact's folder: `output_dir`, or "quantized" beside the logs."""
        return Path(self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "quantized")

    def require_prepared(self) -> Quantizable:
        """Return the prepared model, which exists from fit start on."""
        if self.prepared is None:
            raise MisconfigurationException(
                f"Expected {type(self).__name__} to have seen `on_fit_start`, but it has not."
            )
        return self.prepared

    def observer(self) -> str:
        """Return the name of the observer for activations."""
        raise NotImplementedError

    def _check_names(self, trainer: Trainer, pl_module: LightningModule) -> None:
        runtimes.get(self.runtime, exporting=True)
        strategy = type(trainer.strategy).__name__
        if strategy not in _SINGLE_PROCESS:
            raise QuantizationError(
                f"Expected a strategy out of {_SINGLE_PROCESS}, but got {strategy}. Train on one device, or quantize "
                "the trained checkpoint afterwards with `lightning_quant.quantize`."
            )
        if self.module is not None and trainer.lightning_module is not None and _is_configured(pl_module):
            find_module(pl_module, self.module)
        artifacts.check_folder(self.folder(trainer))

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started = time.perf_counter()
        if self.prepared is not None:
            self.prepared.detach()
        is_wanted = has_layers if isinstance(self.recipe, LayerRecipe) else has_weights
        found = capture_call(trainer, pl_module, self.module, self.example, is_wanted)
        self.path = found.path
        self.prepared = self._plan(resolve(pl_module, found.path), found)
        trial_export(self.prepared, dynamic_shapes=self.dynamic_shapes)
        self.seconds = {"capture": time.perf_counter() - started}
        name = found.path or f"{type(pl_module).__name__}.forward"
        rank_zero_info(
            f"{type(self).__name__}: {name} has {self.prepared.plan.num_quantized} operators for {self.recipe.name} on "
            f"{self.runtime}, {self.prepared.plan.coverage:.1%} of its multiply-adds."
        )

    def _plan(self, module: nn.Module, found: Capture) -> Quantizable:
        call = (module, found.args, found.kwargs)
        where: dict[str, Any] = {"runtime": self.runtime, "selection": self.selection, "module": found.path}
        if isinstance(self.recipe, LayerRecipe):
            return quantize_layers(*call, recipe=self.recipe, **where)
        return prepare(*call, recipe=self.recipe, observer=self.observer(), **where)


def warn(message: str) -> None:
    """Warn that something asked for had no effect or made matters worse."""
    warnings.warn(message, NoEffectWarning, stacklevel=3)


def _is_configured(pl_module: LightningModule) -> bool:
    """Tell whether the module's layers exist before `configure_model` and `setup` have run."""
    return type(pl_module).configure_model is LightningModule.configure_model and any(
        True for _ in pl_module.children()
    )


def _refused_in_callback(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except QuantizationError as error:
        raise MisconfigurationException(str(error)) from error
