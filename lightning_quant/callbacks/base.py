"""What both callbacks share: their arguments, what they refuse before training, and what they do when fit ends."""

import functools
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_quant import artifact as artifacts
from lightning_quant import recipe as recipes
from lightning_quant import runtimes
from lightning_quant.accuracy.recalibrate import Call
from lightning_quant.accuracy.sensitivity import check_rankable
from lightning_quant.arguments import (
    check_flag,
    check_key,
    check_limit,
    check_name,
    check_on_device,
    check_path,
    check_threads,
    patterns,
)
from lightning_quant.artifact import Artifact
from lightning_quant.callbacks.announce import announce, warn
from lightning_quant.callbacks.evaluation_call import difference, evaluation_call
from lightning_quant.callbacks.observe_step import observe_step
from lightning_quant.callbacks.prediction_call import (
    finding_of_prediction,
    prediction_call,
    required_prediction,
)
from lightning_quant.callbacks.recovery import given_arguments, recovery, written
from lightning_quant.callbacks.runtime_choice import choose_at_start
from lightning_quant.callbacks.states import identity_of
from lightning_quant.callbacks.training_data import borrowed_loaders, capture_call
from lightning_quant.callbacks.validation_batches import validation_calls
from lightning_quant.capture import Capture, find_module
from lightning_quant.checkpoint import check_model_and_data, read_checkpoint
from lightning_quant.choice import check_choice
from lightning_quant.distributed import Group
from lightning_quant.engines import AUTO, check_engine
from lightning_quant.errors import CaptureError, QuantizationError
from lightning_quant.export import trial_export
from lightning_quant.folder import fleeting_folder, output_folder
from lightning_quant.graph.analyze import has_weights
from lightning_quant.graph.table import Selection
from lightning_quant.layers import may_have_layers
from lightning_quant.layerwise import quantize_layers
from lightning_quant.loss_inputs import LossInputs, leave_out_labels
from lightning_quant.names import Engine, Example, ExampleName, Recipes, Runtime, Weights, WeightsName
from lightning_quant.namespaces import is_overridden, trainer_class
from lightning_quant.parts import check_takes
from lightning_quant.planned_model import PlannedModel
from lightning_quant.prepare import prepare
from lightning_quant.recipe import AnyRecipe
from lightning_quant.report.limits import Limits, check_measured, limits_from, unlogged
from lightning_quant.routing import resolve
from lightning_quant.sizes import ChosenShapes, chosen_shapes, notes_of_sizes
from lightning_quant.way_inside import fills_modules, way_inside

_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
# Batches of each validation loader whose calls are looked at before training, and where Python reads values in them.
_BATCHES, _MANY_BATCHES = 4, 32
# Subclasses of the above that shard parameters or run on devices that nothing here was tried on.
_OTHER_STRATEGIES = ("DeepSpeedStrategy", "SingleDeviceXLAStrategy")


class QuantizationCallback(Callback):
    """Base of the callbacks; see `QuantizationAwareTraining` and `PostTrainingQuantization`."""

    # Whether the module is prepared for being trained through rounding.
    prepares_training: ClassVar[bool] = False
    # Arguments by name that are no defaults, for lines that make another such callback.
    given: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember what the callback is constructed with."""
        callback = super().__new__(cls)
        callback.given = given_arguments(cls, args, kwargs)
        return callback

    def __init__(
        self,
        recipe: Recipes | dict[str, Any] | AnyRecipe,
        runtime: Runtime,
        *,
        module: str | None,
        output_dir: str | Path | None,
        include: str | list[str] | tuple[str, ...],
        exclude: str | list[str] | tuple[str, ...],
        example: Example,
        weights: Weights,
        evaluate: bool,
        limit_eval_batches: int | float | None,
        threads: int | None,
        engine: Engine,
        dynamic_shapes: ChosenShapes,
        sensitivity: bool,
        name: str | None,
        limits: Limits | dict[str, Any] | None,
    ) -> None:
        super().__init__()
        self.recipe = _refused_in_callback(recipes.get, recipe)
        self.runtime = runtime
        # The same, but for "auto": that is decided at fit start, or was in the run that is resumed.
        self.chosen_runtime: str = "" if runtime == AUTO else runtime
        self.module = module
        self.output_dir = output_dir
        self.selection = _refused_in_callback(
            lambda: Selection(patterns("include", include), patterns("exclude", exclude))
        )
        self.example = example
        self.weights = weights
        self.evaluate = evaluate
        self.limit_eval_batches = limit_eval_batches
        self.threads = threads
        self.engine = engine
        self.dynamic_shapes = dynamic_shapes
        self.sensitivity = sensitivity
        self.name = name
        self.limits = _refused_in_callback(limits_from, limits)
        _refused_in_callback(self._check_arguments)
        # Known from fit start on, when the module exists on its device and its data can be read.
        self.prepared: PlannedModel | None = None
        self.artifact: Artifact | None = None
        self.loss_inputs: LossInputs | None = None
        self.path = ""
        self.seconds: dict[str, float] = {}
        # What the report should say: of the weights that were chosen, and of what was found at fit start.
        self.notes: tuple[str, ...] = ()
        self.findings: tuple[str, ...] = ()
        # Share of the step's multiply-adds that the module makes.
        self.step_share = 1.0
        self.group = Group()
        self.last_folder = Path()
        # Whether the weights were trained through rounding, and the metrics of the last validation before that.
        self.trains_rounded = False
        self.metrics_before: dict[str, float] = {}
        # Whether an interruption from now on costs the artifact.
        self._begun = False
        # The call that validation makes, and whether it is another one than training's.
        self._evaluated: Capture | None = None
        self._evaluated_otherwise = False
        # Whether a validation was looked at.
        self._validated = False
        # The checkpoint that `quantize_checkpoint` is at work on.
        self._checkpoint: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles, which projects make of their Trainer's callbacks, hold no model: fit finds its own."""
        return {
            **self.__dict__,
            "prepared": None,
            "loss_inputs": None,
            "_begun": False,
            "_evaluated": None,
            "_checkpoint": None,
        }

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({written(self, self.runtime, {})})"

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(**identity_of(self))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit begins: refuse what names alone can tell."""
        if stage == "fit":
            _refused_in_callback(self._check_strategy, trainer)
            self.group = Group(trainer.world_size, trainer.strategy.root_device)
            _refused_in_callback(self.group.together, self._check_names, trainer, pl_module)
            # By the first process alone, as it is written: others would keep it from leaving no folder behind.
            self.last_folder = _refused_in_callback(self.group.on_first, artifacts.check_folder, self.folder(trainer))
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                kept, self.last_folder = self.last_folder, self.group.on_first(fleeting_folder)
                rank_zero_info(
                    f"fast_dev_run: the artifact goes to {self.last_folder} while this process lives; {kept} stays."
                )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit begins, after restore and device placement: capture, plan, and export once on trial."""
        if self._checkpoint is not None:
            _refused_in_callback(_load_weights, trainer, self._checkpoint)
        started = time.perf_counter()
        _refused_in_callback(self._plan_and_try, trainer, pl_module)
        self.seconds = {"capture": time.perf_counter() - started}
        self._begun = True

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation ends: warn, the first time, of limits on what it does not log."""
        unknown = "" if self._validated else unlogged(self.limits, trainer.callback_metrics)
        self._validated = True
        if unknown:
            warn(f"{type(self).__name__}: {unknown}.")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when fit is interrupted: give the module its own forward back, and say how to go on from here."""
        begun = self._begun
        self.teardown(trainer, pl_module, "fit")
        if begun and self._checkpoint is None:
            outcome = "an artifact was written, but not measured" if self.artifact else "no artifact was made"
            rank_zero_info(f"{type(self).__name__}: {outcome}. {recovery(self, trainer)}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit ends, however it ends: give the module its own forward back."""
        self._begun = False
        if self.prepared is not None:
            self.prepared.detach()

    def folder(self, trainer: Trainer) -> Path:
        """Return the absolute path of the artifact's folder: `output_dir`, or "quantized" beside the logs."""
        return output_folder(self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "quantized")

    def quantize_checkpoint(
        self,
        ckpt_path: str | Path,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        trust_checkpoint: bool = False,
        **trainer_options: Any,
    ) -> Artifact:
        """Make the artifact from a Lightning checkpoint, on one device and without training.

        Args:
            ckpt_path: any checkpoint of the model for post-training quantization; for quantization-aware training one
                with this callback's state, whose ranges are used.
            model: the LightningModule, with whatever weights.
            datamodule: its data, when it has not dataloaders of its own.
            train_dataloaders: the same, without a datamodule.
            val_dataloaders: likewise, to evaluate on.
            trust_checkpoint: whether to load more of it than tensors and plain values, which runs code of whoever
                wrote the file.
            **trainer_options: for the Trainer, `accelerator` for example.
        """
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False} | trainer_options
        options |= {"devices": 1, "max_epochs": 0, "enable_checkpointing": False, "callbacks": [self]}
        _refused_in_callback(check_model_and_data, model, datamodule)
        self._checkpoint = _refused_in_callback(functools.partial(read_checkpoint, trust=trust_checkpoint), ckpt_path)
        self.notes = (f"weights are those of {Path(ckpt_path).name}",)
        try:
            trainer_class(model)(**options).fit(model, train_dataloaders, val_dataloaders, datamodule)
        finally:
            self._checkpoint, self.notes = None, ()
        if self.artifact is None:
            raise MisconfigurationException(f"Expected {ckpt_path} to become an artifact, but fit was cut short.")
        return self.artifact

    def require_prepared(self) -> PlannedModel:
        """Return the prepared model, which exists from fit start on."""
        if self.prepared is None:
            raise MisconfigurationException(
                f"Expected {type(self).__name__} to have seen `on_fit_start`, but it has not."
            )
        return self.prepared

    def observer(self) -> str:
        """Return the name of the observer for activations."""
        raise NotImplementedError

    def hyperparameters(self) -> dict[str, Any]:
        """Return what an artifact is made with, as loggers hold it."""
        return {"recipe": self.recipe.name, "runtime": self.runtime, "module": self.path}

    def _check_arguments(self) -> None:
        """Refuse what needs neither module nor trainer to be known as wrong."""
        runtimes.check_name(self.runtime)
        check_engine(self.runtime, self.engine)
        check_key("name", self.name)
        check_name("module", self.module, "the LightningModule")
        check_path("output_dir", self.output_dir)
        check_choice("example", self.example, get_args(ExampleName))
        check_choice("weights", self.weights, get_args(WeightsName))
        check_flag("evaluate", self.evaluate)
        check_flag("sensitivity", self.sensitivity)
        check_limit("limit_eval_batches", self.limit_eval_batches)
        check_threads(self.threads)
        chosen_shapes(self.dynamic_shapes)
        check_rankable(self.recipe, sensitivity=self.sensitivity)
        if not self.evaluate:
            check_measured(self.limits, "got `evaluate=False`")

    def _check_names(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.runtime != AUTO:
            runtimes.get(self.runtime, exporting=True)
            runtimes.check_recipe(self.runtime, self.recipe)
        if self.module is not None and trainer.lightning_module is not None and _is_configured(pl_module):
            find_module(pl_module, self.module)
        folder = self.folder(trainer)
        others = [c for c in trainer.callbacks if isinstance(c, QuantizationCallback) and c is not self]  # type: ignore[attr-defined]
        if any(other.folder(trainer) == folder for other in others):
            raise QuantizationError(
                f"Expected every quantization callback to have an `output_dir` of its own, but two have {folder}."
            )

    def _check_strategy(self, trainer: Trainer) -> None:
        bases = [base.__name__ for base in type(trainer.strategy).__mro__]
        if not any(name in bases for name in _STRATEGIES) or any(name in bases for name in _OTHER_STRATEGIES):
            raise QuantizationError(
                f"Expected a strategy out of {_STRATEGIES} (`auto`, `ddp`, `ddp_spawn`), but got {bases[0]}, which "
                "may shard the parameters. Train without this callback, and quantize the consolidated checkpoint "
                "afterwards: PostTrainingQuantization(...).quantize_checkpoint(ckpt_path, model, datamodule)."
            )

    def _plan_and_try(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with way_inside(self.recipe, self.runtime):
            with borrowed_loaders(trainer):
                self.group.together(self._prepare, trainer, pl_module)
            model = self.require_prepared()
            sizes = self.group.on_first(self._try_export, model)
            self.group.together(self._take_sizes, trainer, pl_module, model, sizes)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.prepared is not None:
            self.prepared.detach()
        self.artifact, self._begun, self.step_share = None, False, 1.0
        _check_initialized(pl_module)
        is_wanted = has_weights if self.recipe.needs_calibration else may_have_layers(pl_module)
        together = fills_modules(self.recipe, self.chosen_runtime)
        found = capture_call(trainer, pl_module, self.module, self.example, is_wanted, together=together)
        self.path = found.path
        self.findings = self._look_beside(trainer, pl_module, found)
        found = self._as_evaluated(trainer, pl_module, found)
        if self.runtime == AUTO and not self.chosen_runtime:
            module = resolve(pl_module, found.path)
            self.chosen_runtime, note = self.group.on_first(choose_at_start, self, module, found)
            self.findings += (note,)
        self.prepared = self._plan(resolve(pl_module, found.path), found)
        self.prepared.learns_from_captured = self._evaluated_otherwise
        if self._evaluated is not None:
            self.prepared.note_sizes(self._evaluated.args, self._evaluated.kwargs)
            for call in validation_calls(trainer, pl_module, found.path, _BATCHES):
                _note_sizes(self.prepared, call)
        name = found.path or ", ".join(found.parts) or f"{type(pl_module).__name__}.forward"
        announce(type(self).__name__, name, self.prepared, self.step_share)

    def _plan(self, module: nn.Module, found: Capture) -> PlannedModel:
        where: dict[str, Any] = {"runtime": self.chosen_runtime, "selection": self.selection, "module": found.path}
        if not self.recipe.needs_calibration:
            args, kwargs, self.loss_inputs = found.args, found.kwargs, None
            if not found.parts:
                args, kwargs, self.loss_inputs = leave_out_labels(module, args, kwargs)
            return quantize_layers(module, args, kwargs, recipe=self.recipe, **where)
        observed: dict[str, Any] = {"observer": self.observer(), "trains": self.prepares_training}
        return prepare(module, found.args, found.kwargs, recipe=self.recipe, **observed, **where)

    def _look_beside(self, trainer: Trainer, pl_module: LightningModule, found: Capture) -> tuple[str, ...]:
        if self.example == "example_input_array" or not self.path:
            return ()
        step = observe_step(trainer, pl_module, self.path)
        self.step_share, beside = step.share, step.beside
        if found.beside:
            finding = (
                f"training_step calls {', '.join(map(repr, found.beside))} beside {self.path!r}, which makes "
                f"{step.share:.1%} of its multiply-adds: those modules are float"
            )
            rank_zero_info(f"{type(self).__name__}: {finding}. Choose another one with `module=...`.")
            return (finding,)
        if not beside:
            return ()
        finding = (
            f"training_step also calls {', '.join(beside[:5])}{', ...' if len(beside) > 5 else ''} past the forward of "
            f"{self.path!r}: those calls are float"
        )
        warn(f"{type(self).__name__}: {finding}. Call {self.path!r} itself to have them quantized.")
        return (finding,)

    def _as_evaluated(self, trainer: Trainer, pl_module: LightningModule, found: Capture) -> Capture:
        """Return the call to export: that of validation where it is another one than training's but for the tensors.

        Or that of predict, where that is asked for.
        """
        self._evaluated, self._evaluated_otherwise = None, False
        if self.example == "example_input_array" or found.parts:
            return found
        module = resolve(pl_module, found.path)
        self._evaluated = evaluation_call(trainer, pl_module, found.path)
        if self.example == "predict_batch":
            wanted: Capture | None = required_prediction(trainer, pl_module, found.path)
            self._check_evaluates(module, wanted)
        else:
            wanted = self._evaluated
        if wanted is not None and (differs := difference(module, found, wanted)):
            self._evaluated_otherwise = True
            which = "predict" if self.example == "predict_batch" else "validation"
            self._find(
                f"{which} calls {found.path or 'the module'!r} otherwise: {differs}. Its call is the one exported, and "
                "ranges of what training does not reach come from it"
            )
            found = wanted
        prediction = None if self.example == "predict_batch" else prediction_call(trainer, pl_module, found.path)
        if prediction is not None:
            fills = fills_modules(self.recipe, self.chosen_runtime)
            self._find(finding_of_prediction(module, found, prediction, fills=fills))
        return found

    def _check_evaluates(self, module: nn.Module, prediction: Capture | None) -> None:
        """Refuse to evaluate an artifact of predict's call by a validation that makes another one."""
        if not self.evaluate or self._evaluated is None or prediction is None:
            return
        differs = difference(module, prediction, self._evaluated, than="predict")
        if differs and not fills_modules(self.recipe, self.chosen_runtime):
            raise CaptureError(
                f"Expected validation to call the module as predict does, to evaluate the artifact by, but {differs}. "
                "Pass `evaluate=False`."
            )

    def _find(self, finding: str) -> None:
        if finding:
            rank_zero_info(f"{type(self).__name__}: {finding}.")
            self.findings += (finding,)

    def _try_export(self, model: PlannedModel) -> tuple[Any, ...]:
        """Try the end, and return what was found out of the sizes."""
        trial_export(model, dynamic_shapes=self.dynamic_shapes)
        return model.found_sizes()

    def _take_sizes(
        self, trainer: Trainer, pl_module: LightningModule, model: PlannedModel, found: tuple[Any, ...]
    ) -> None:
        """Let every process know what the first found out; say what stays as captured, and refuse what cannot be."""
        model.take_sizes(found)
        for note in notes_of_sizes(model):
            rank_zero_info(f"{type(self).__name__}: {note}.")
        model.detach()
        if self._evaluated is not None and self.evaluate and not model.takes_any_call:
            number = _MANY_BATCHES if model.decided else _BATCHES
            check_takes(model, self._evaluated.args, self._evaluated.kwargs)
            for args, kwargs in validation_calls(trainer, pl_module, self.path, number):
                check_takes(model, args, kwargs)


def _note_sizes(model: PlannedModel, call: Call) -> None:
    """Remember the sizes of a call, unless it is one that no file can take."""
    with suppress(CaptureError):
        model.note_sizes(*call)


def _load_weights(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    try:
        trainer.strategy.load_model_state_dict(checkpoint)
    except RuntimeError as error:
        raise QuantizationError(
            f"Expected the checkpoint to be one of {type(trainer.lightning_module).__name__} with the same "
            f"hyperparameters, but {error}"
        ) from error


def _is_configured(pl_module: LightningModule) -> bool:
    """Tell whether the module's layers exist before `configure_model` and `setup` have run."""
    late = ("configure_model", "setup")
    return not any(is_overridden(name, pl_module) for name in late) and any(True for _ in pl_module.children())


def _check_initialized(pl_module: LightningModule) -> None:
    lazy = [name for name, parameter in pl_module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise CaptureError(
            f"Expected every layer to have its shape when fit begins, but {', '.join(lazy[:3])} "
            f"{'is' if len(lazy) == 1 else 'are'} lazy. Run a batch through the model in `configure_model` or `setup`."
        )
    check_on_device(pl_module)


def _refused_in_callback(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except QuantizationError as error:
        raise MisconfigurationException(str(error)) from error
