"""Quantization-aware training as a callback."""

import copy
import math
import os
from dataclasses import asdict, replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightning_quant.arguments.names import Engine, Example, Recipes, Runtime, ScoreWith, Weights
from lightning_quant.calibrate.distributed import merge_batch
from lightning_quant.callbacks.after_training import rank, reestimate, training_calls
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.deployment import choose_weights
from lightning_quant.callbacks.finish import finish
from lightning_quant.callbacks.only_if_needed import Need, better_weights, need_of, without_rounding
from lightning_quant.callbacks.refusals import check_trained_once, refused_in_callback
from lightning_quant.callbacks.schedule import Schedule, Timeline, is_updating_batch_norm, rate_of, timeline_of
from lightning_quant.callbacks.searching import NUM_BATCHES, Recorded, searched
from lightning_quant.callbacks.states import state_of
from lightning_quant.callbacks.teaching import loss_scale, teach
from lightning_quant.callbacks.training_settings import TrainingSettings
from lightning_quant.callbacks.untrained import untrained
from lightning_quant.doors.settings import documented
from lightning_quant.errors import QuantizationError
from lightning_quant.export.engines import AUTO
from lightning_quant.measure.attempts import noting
from lightning_quant.measure.sensitivity import NUM_CALLS
from lightning_quant.planned.sizes import ChosenShapes
from lightning_quant.ranges.observer_merge import check_mergeable
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.report.limits import NO_LIMITS, Limits
from lightning_quant.simulate.damping import add_damping_gradient, growing
from lightning_quant.simulate.distillation import Distill
from lightning_quant.simulate.prepared import Prepared


@documented(TrainingSettings)
class QuantizationAwareTraining(QuantizationCallback):
    """Train through rounding, and export an integer model when fit ends.

    Only the module's `forward` is routed to a graph with fake quantization while fit runs: type, parameters,
    `state_dict`, optimizers and checkpoints are those of the float model, and so is the module after fit, with weights
    that were trained through rounding.

    Raises:
        MisconfigurationException: before the first batch, when anything is known to fail, with the way out.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[QuantizationAwareTraining(output_dir="quantized")], logger=False)
    """

    prepares_training = True

    def __init__(
        self,
        recipe: Recipes | dict[str, Any] | Recipe = "int8",
        runtime: Runtime = "onnxruntime",
        *,
        module: str | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        schedule: Schedule | dict[str, Any] | None = None,
        distill: Distill | dict[str, Any] | float | None = None,
        only_if_needed: Limits | dict[str, Any] | None = None,
        include: str | list[str] | tuple[str, ...] = ("*",),
        exclude: str | list[str] | tuple[str, ...] = (),
        example: Example = "train_batch",
        weights: Weights = "last",
        evaluate: bool = True,
        limit_eval_batches: int | float | None = None,
        score_every: int | None = None,
        score_batches: int | float | None = None,
        score_with: ScoreWith = "simulation",
        threads: int | None = None,
        engine: Engine = "auto",
        dynamic_shapes: ChosenShapes = None,
        sensitivity: bool = False,
        name: str | None = None,
        limits: Limits | dict[str, Any] | None = None,
        objective: str | None = None,
        max_validations: int | None = None,
        time_budget_s: float | None = None,
        show_samples: bool = True,
    ) -> None:
        super().__init__(refused_in_callback(TrainingSettings.of, locals()))
        self.timeline = Timeline({}, in_epochs=False)
        # A checkpoint's state arrives before fit start, when there is nothing yet to put it into.
        self._restored: dict[str, Any] | None = None
        # Whether training through rounding is needed, where that is asked.
        self.need: Need | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "need": None}

    @property
    @override
    def settings(self) -> TrainingSettings:
        return TrainingSettings.of(vars(self))

    @override
    def observer(self) -> str:
        return self.settings.recipe.training_observer

    @override
    def hyperparameters(self) -> dict[str, Any]:
        """Return what an artifact is made with, and when the phases of training begin."""
        given = {name: value for name, value in asdict(self.settings.schedule).items() if value is not None}
        points = {f"schedule/{name}": "never" if value == math.inf else value for name, value in given.items()}
        return {**super().hyperparameters(), **points}

    def require_prepared(self) -> Prepared:
        """Return the prepared model, which has a graph: recipes of layers are refused."""
        return Prepared.of(super().require_prepared())

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit begins: capture, plan, trial export; take over the ranges of a resumed run."""
        if self._checkpoint is not None and self.settings.runtime == AUTO:
            self._take_runtime(refused_in_callback(self._state_in, self._checkpoint))
        super().on_fit_start(trainer, pl_module)
        if self.settings.only_if_needed != NO_LIMITS:
            self.need = refused_in_callback(need_of, self, trainer, pl_module, self.settings.only_if_needed)
        refused_in_callback(self._begin, trainer)
        if self.settings.distill is not None and self._checkpoint is None:
            refused_in_callback(teach, self.require_prepared(), self.settings.distill, trainer, vars(self)["distill"])

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before a training batch: set the phase and let ranges follow this batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        phase = self.timeline.phase(trainer)
        if self.need is not None:
            phase = self.need.phase(self, trainer, pl_module, phase)
        phase = "frozen" if phase == "frozen_batch_norm" and is_updating_batch_norm(trainer) else phase
        self._enter(phase, trainer)
        prepared = self.require_prepared()
        prepared.observing = True
        prepared.anneal_bits(self.timeline.width(trainer))
        if prepared.quantizes:
            # Before the batch: what is compiled reads scales, and makes none.
            prepared.ranges.grids()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called before the user's optimizer moves weights: ours moves their learned scales."""
        prepared = self.require_prepared()
        if prepared.quantizes and prepared.recipe.damping:
            moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            add_damping_gradient(prepared, moved, prepared.recipe.damping * growing(self.timeline.progress(trainer)))
        prepared.move_learned(self.group.mean, 1.0 / loss_scale(trainer), rate_of(trainer, optimizer))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after a training batch: nothing outside training moves the ranges."""
        prepared = self.require_prepared()
        prepared.observing = False
        if self.group.size > 1 and prepared.phase in ("observe", "fake_quantize"):
            merge_batch(self.group, prepared.ranges)
        prepared.ranges.settle()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation ends: end training through rounding that has reached what it was needed for."""
        super().on_validation_end(trainer, pl_module)
        if self.need is not None:
            self.need.validated(self, trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit ends: convert, export, measure, log."""
        self.require_prepared().detach()
        if self.need is not None and self.need.needed is False:
            self.artifact = finish(self, trainer, without_rounding(self, trainer, pl_module, self.need))
            return
        self.trains_rounded = self.require_prepared().quantizes
        if self.trains_rounded:
            deployment = choose_weights(self, trainer, pl_module, with_ranges=True, weights="last" * bool(self.need))
        else:
            deployment = untrained(self, trainer, pl_module)
        if self.trains_rounded and self.settings.recipe.batch_norm_batches > 0:
            number = self.settings.recipe.batch_norm_batches
            deployment = reestimate(self.group, trainer, deployment, self.path, number)
        if self.settings.sensitivity:
            with noting(self.missing, "sensitivities are"):
                deployment = replace(deployment, sensitivity=rank(trainer, deployment, self.path))
        if self.settings.searches:
            prepared, calls = training_calls(trainer, deployment, self.path, NUM_BATCHES)
            deployment = searched(self, trainer, deployment, Recorded(prepared, calls, calls[:NUM_CALLS]))
        if self.need is not None and self.need.needed:
            deployment = better_weights(self, trainer, pl_module, deployment, self.need)
        self.artifact = finish(self, trainer, deployment)

    def _begin(self, trainer: Trainer) -> None:
        prepared = self.require_prepared()
        prepared.begin_learning()
        if self._checkpoint is not None:
            state = self._state_in(self._checkpoint)
            self._take_metrics(state)
            prepared.load_state_dict(state)
            return
        others = [c for c in trainer.callbacks if isinstance(c, QuantizationAwareTraining) and c is not self]  # type: ignore[attr-defined]
        check_trained_once(self.path, [other.path for other in others if other.prepared is not None])
        self.timeline = timeline_of(self.settings.schedule, trainer)
        prepared.ranges.waits = self.group.size > 1
        # Another forward in the way is found here, not when the first phase begins.
        prepared.attach()
        prepared.detach()
        self._take_metrics(self._restored or {})
        if self._restored is not None:
            prepared.load_state_dict(self._restored)
        elif trainer.ckpt_path:
            rank_zero_info(
                "QuantizationAwareTraining: the checkpoint has no quantizer state, so observing begins anew."
            )
        if prepared.phase != "off":
            prepared.attach()

    def _take_metrics(self, state: dict[str, Any]) -> None:
        self.metrics_before = state.get("metrics_before", {})
        if self.need is not None and "need" in state:
            self.need.load(state["need"])

    def _enter(self, phase: str, trainer: Trainer) -> None:
        """Change the phase; a module that is not even observed keeps its own forward."""
        prepared = self.require_prepared()
        if phase == prepared.phase:
            return
        was_rounding = prepared.quantizes
        prepared.set_phase(phase)
        if prepared.quantizes and not was_rounding:
            self.metrics_before = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if phase == "off":
            prepared.detach()
        elif not prepared.is_attached:
            prepared.attach()
        rank_zero_info(f"QuantizationAwareTraining: {phase.replace('_', ' ')} from step {trainer.global_step}.")

    @override
    def _check_names(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._check_names(trainer, pl_module)
        if self.group.size > 1:
            check_mergeable("training_observer", self.observer(), self.settings.recipe, in_training=True)
        alone = self.settings.sensitivity or self.settings.only_if_needed != NO_LIMITS
        if self.group.size > 1 and alone:
            name = "sensitivity" if self.settings.sensitivity else "only_if_needed"
            raise QuantizationError(
                f"Expected one process for `{name}`, but got {self.group.size}. Train without it, and use "
                "`quantize_checkpoint` with it afterwards."
            )

    def _take_runtime(self, state: dict[str, Any]) -> None:
        """Go on with the runtime that was chosen when training began: it says which tensors have ranges."""
        if self.settings.runtime == AUTO:
            self.chosen_runtime = state.get("runtime", "")

    def _state_in(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return this callback's state in a checkpoint; with other arguments than then, the only one of its kind."""
        states = {
            key: state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith(type(self).__name__)
        }
        state = state_of(self, self.settings, states) or (next(iter(states.values())) if len(states) == 1 else None)
        if not state or state["phase"] == "off":
            raise QuantizationError(
                f"Expected a checkpoint with the ranges of {self.state_key}, but it has "
                f"{sorted(states) or 'no state of quantization-aware training'}. To learn ranges without training: "
                "PostTrainingQuantization(...).quantize_checkpoint(...)."
            )
        return state

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when fit resumes: find the state that an earlier version saved under another name."""
        states = checkpoint.get("callbacks", {})
        if self.state_key not in states and (state := state_of(self, self.settings, states)) is not None:
            self.load_state_dict(copy.deepcopy(state))

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.prepared is None:
            return self._restored or {}
        state: dict[str, Any] = {"runtime": self.chosen_runtime, "metrics_before": self.metrics_before}
        state |= {} if self.need is None else {"need": self.need.state()}
        return {**self.require_prepared().state_dict(), **state}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        super().load_state_dict(state_dict)
        self._restored = state_dict
        self._take_runtime(state_dict)
        if self.prepared is not None:
            self.require_prepared().load_state_dict(state_dict)
