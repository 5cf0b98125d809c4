"""What both callbacks do when fit begins and when it is cut short, and with a checkpoint in place of a fit."""

import functools
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_quant.artifact import artifact as artifacts
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.artifact.folder import fleeting_folder, output_folder
from lightning_quant.calibrate.distributed import Group
from lightning_quant.callbacks import refusals
from lightning_quant.callbacks.announce import announce, announce_beside
from lightning_quant.callbacks.captured import look_at_module
from lightning_quant.callbacks.exported_call import ExportedCall
from lightning_quant.callbacks.recovery import recovery
from lightning_quant.callbacks.refusals import refused_in_callback
from lightning_quant.callbacks.runtime_choice import choose_at_start
from lightning_quant.callbacks.scored_validation import ScoredValidation
from lightning_quant.callbacks.search_checks import check_searchable
from lightning_quant.callbacks.shared import Alone, Shared
from lightning_quant.callbacks.states import identity_of
from lightning_quant.callbacks.training_data import borrowed_loaders
from lightning_quant.callbacks.unplanned import Planned
from lightning_quant.callbacks.validation_batches import check_batches, note_sizes
from lightning_quant.capture.capture import Capture, isolated_rng
from lightning_quant.capture.checkpoint import check_model_and_data, read_checkpoint
from lightning_quant.capture.loss_inputs import LossInputs, leave_out_labels
from lightning_quant.capture.namespaces import trainer_class
from lightning_quant.doors.settings import CallbackSettings
from lightning_quant.export.engines import AUTO
from lightning_quant.export.prepare import prepare
from lightning_quant.machine.timed import timed
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.planned.parts import check_takes
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.planned.sizes import notes_of_sizes
from lightning_quant.planned.way_inside import fills_modules, way_inside
from lightning_quant.search.checks import check_size
from lightning_quant.surgery.routing import resolve
from lightning_quant.terminal import progress


class QuantizationCallback(ScoredValidation):
    """Base of the callbacks; see `QuantizationAwareTraining` and `PostTrainingQuantization`."""

    # Whether the module is prepared for being trained through rounding.
    prepares_training: ClassVar[bool] = False

    def __init__(self, settings: CallbackSettings) -> None:
        super().__init__()
        # Arguments are attributes, as Lightning's callbacks have them; `settings` checks them together.
        vars(self).update(vars(settings))
        # The runtime, but for "auto": that is decided at fit start, or was in the run that is resumed.
        self.chosen_runtime: str = "" if settings.runtime == AUTO else settings.runtime
        # Known from fit start on, when the module exists on its device and its data can be read.
        self.prepared: PlannedModel | None = None
        self.planned: Planned | None = None
        self.artifact: Artifact | None = None
        self.loss_inputs: LossInputs | None = None
        self.seconds: dict[str, float] = {}
        # What the report should say: of the chosen weights, what was found at fit start, what could not be measured.
        self.notes: tuple[str, ...] = ()
        self.findings: tuple[str, ...] = ()
        self.missing: list[str] = []
        # Share of the step's multiply-adds that the module makes.
        self.step_share = 1.0
        self.group = Group()
        self.path, self.last_folder = "", Path()
        # Whether the weights were trained through rounding, and the metrics of the last validation before that.
        self.trains_rounded = False
        self.metrics_before: dict[str, float] = {}
        # Whether an interruption from now on costs the artifact.
        self._begun = False
        # The call that is exported, known from fit start on.
        self.exported: ExportedCall | None = None
        # The checkpoint that `quantize_checkpoint` is at work on.
        self._checkpoint: dict[str, Any] | None = None
        # What was seen and measured for other artifacts of the same training.
        self.shared: Shared = Alone()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles, which projects make of their Trainer's callbacks, hold no model: fit finds its own."""
        models = ("prepared", "planned", "loss_inputs", "exported", "_checkpoint")
        return {**super().__getstate__(), **dict.fromkeys(models), "_begun": False, "shared": Alone()}

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings.as_code()})"

    @property
    @override
    def state_key(self) -> str:
        # Read around every hook, which is too often to check all settings anew.
        return self._generate_state_key(**identity_of(self))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit begins: refuse what names alone can tell."""
        if stage == "fit":
            self._num_validations = 0
            progress.follow(trainer.progress_bar_callback)
            refused_in_callback(refusals.check_strategy, trainer)
            self.group = Group(trainer.world_size, trainer.strategy.root_device)
            refused_in_callback(self.group.together, self._check_names, trainer, pl_module)
            # By the first process alone, as it is written: others would keep it from leaving no folder behind.
            self.last_folder = refused_in_callback(self.group.on_first, artifacts.check_folder, self.folder(trainer))
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                kept, self.last_folder = self.last_folder, self.group.on_first(fleeting_folder)
                rank_zero_info(
                    f"fast_dev_run: the artifact goes to {self.last_folder} while this process lives; {kept} stays."
                )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit begins, after restore and device placement: capture, plan, and export once on trial."""
        if self._checkpoint is not None:
            refused_in_callback(refusals.load_weights, trainer, self._checkpoint)
        self.seconds = {}
        with timed(self.seconds, "capture"):
            refused_in_callback(self._plan_and_try, trainer, pl_module)
            refused_in_callback(check_searchable, self, trainer, pl_module)
        self._begun = True

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before a training batch: refuse, before the first, a module that is not as it was planned."""
        if self.planned is not None:
            refused_in_callback(self.planned.check_once, self.require_prepared(), resolve(pl_module, self.path))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when fit is interrupted: give the module its own forward back, and say how to go on from here."""
        begun = self._begun
        self.teardown(trainer, pl_module, "fit")
        if begun and self._checkpoint is None:
            outcome = "an artifact was written, but not measured" if self.artifact else "no artifact was made"
            rank_zero_info(f"{type(self).__name__}: {outcome}. {self.way_back(trainer)}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit ends, however it ends: give the module its own forward back."""
        self._begun = False
        progress.follow(None)
        self.drop_score()
        if self.prepared is not None:
            self.prepared.detach()

    def folder(self, trainer: Trainer) -> Path:
        """Return the absolute path of the artifact's folder: `output_dir`, or "quantized" beside the logs."""
        return output_folder(
            self.settings.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "quantized"
        )

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
        refused_in_callback(check_model_and_data, model, datamodule, train_dataloaders)
        self._checkpoint = refused_in_callback(functools.partial(read_checkpoint, trust=trust_checkpoint), ckpt_path)
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

    def way_back(self, trainer: Trainer) -> str:
        """Return what to run to get the artifact from the newest checkpoint of this run, without training on."""
        known = {"runtime": self.chosen_runtime or self.settings.runtime, "module": self.path or self.settings.module}
        arguments = self.settings.as_code(**known, output_dir=self.last_folder)
        return recovery(f"{type(self).__name__}({arguments})", trainer)

    def observer(self) -> str:
        """Return the name of the observer for activations."""
        raise NotImplementedError

    def hyperparameters(self) -> dict[str, Any]:
        """Return what an artifact is made with, as loggers hold it."""
        return {"recipe": self.settings.recipe.name, "runtime": self.settings.runtime, "module": self.path}

    def _check_names(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refusals.check_names(self.settings, trainer, pl_module)
        refusals.check_alone(self.settings, self.group.size)
        others = [c for c in trainer.callbacks if isinstance(c, QuantizationCallback) and c is not self]  # type: ignore[attr-defined]
        refusals.check_own_folder(self.folder(trainer), [other.folder(trainer) for other in others])

    def _plan_and_try(self, trainer: Trainer, pl_module: LightningModule) -> None:
        part = functools.partial(refusals.working_part_of, self, pl_module)
        with way_inside(self.settings.recipe, self.settings.runtime, part):
            with borrowed_loaders(trainer):
                self.group.together(self._prepare, trainer, pl_module)
                if self._checkpoint is None:
                    self.group.together(self.begin_scores, trainer, pl_module)
            model = self.require_prepared()
            sizes = self.group.on_first(self._try_export, model)
            self.group.together(self._take_sizes, trainer, pl_module, model, sizes)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.prepared is not None:
            self.prepared.detach()
        settings = self.settings
        self.artifact, self._begun, self.step_share, self.missing = None, False, 1.0, []
        refusals.check_initialized(pl_module)
        together = fills_modules(settings.recipe, self.chosen_runtime)
        look = functools.partial(look_at_module, trainer, pl_module, settings, together=together)
        seen = self.shared.once(("captured", settings.recipe.needs_calibration, together), look)
        captured, exported = seen.captured, seen.exported
        self.path, self.findings = captured.path, ()
        if seen.step is not None:
            self.step_share, self.findings = seen.step.share, announce_beside(type(self).__name__, captured, seen.step)
        for finding in exported.findings:
            rank_zero_info(f"{type(self).__name__}: {finding}.")
        self.findings += exported.findings
        self.exported, captured = exported, exported.capture
        if settings.runtime == AUTO and not self.chosen_runtime:
            choose = functools.partial(choose_at_start, settings, trains=self.prepares_training)
            choice = self.group.on_first(choose, resolve(pl_module, captured.path), captured)
            self.chosen_runtime = choice.runtime
            self.findings += (choice.note,)
            self.missing += choice.warnings
        # A parametrization may draw random numbers.
        with isolated_rng():
            self.prepared = self._plan(module := resolve(pl_module, captured.path), captured)
        self.planned = Planned(module)
        self.prepared.learns_from_captured = exported.otherwise
        if exported.evaluated is not None:
            self.prepared.note_sizes(exported.evaluated.args, exported.evaluated.kwargs)
            note_sizes(self.prepared, trainer, pl_module, captured.path)
        name = captured.path or ", ".join(captured.parts) or f"{type(pl_module).__name__}.forward"
        announce(type(self).__name__, name, self.prepared, self.step_share)

    def _plan(self, module: nn.Module, captured: Capture) -> PlannedModel:
        recipe, selection = self.settings.recipe, self.settings.selection
        where: dict[str, Any] = {"runtime": self.chosen_runtime, "selection": selection, "module": captured.path}
        if not recipe.needs_calibration:
            args, kwargs, self.loss_inputs = captured.args, captured.kwargs, None
            if not captured.parts:
                args, kwargs, self.loss_inputs = leave_out_labels(module, args, kwargs)
            return quantize_layers(module, args, kwargs, recipe=recipe, **where)
        observed: dict[str, Any] = {"observer": self.observer(), "trains": self.prepares_training}
        return prepare(module, captured.args, captured.kwargs, recipe=recipe, **observed, **where)

    def _try_export(self, model: PlannedModel) -> tuple[Any, ...]:
        """Try the end, and return what was found out of the sizes."""
        settings = self.settings
        size, sizes = self.shared.tried(model, dynamic_shapes=settings.dynamic_shapes, engine=settings.engine)
        if settings.searches:
            check_size(settings.limits, model, size)
        return sizes

    def _take_sizes(
        self, trainer: Trainer, pl_module: LightningModule, model: PlannedModel, sizes: tuple[Any, ...]
    ) -> None:
        """Let every process know what the first found out; say what stays as captured, and refuse what cannot be."""
        model.take_sizes(sizes)
        for note in notes_of_sizes(model):
            rank_zero_info(f"{type(self).__name__}: {note}.")
        model.detach()
        evaluated = None if self.exported is None else self.exported.evaluated
        if evaluated is not None and self.settings.evaluate and not model.takes_any_call:
            check_takes(model, evaluated.args, evaluated.kwargs)
            check_batches(model, trainer, pl_module, self.path)
