"""Quantization-aware training as a callback."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_quant.accuracy.batch_norm import reestimate_batch_norm
from lightning_quant.accuracy.sensitivity import NUM_CALLS, Sensitivity, rank_operators
from lightning_quant.callbacks.base import QuantizationCallback, _refused_in_callback, warn
from lightning_quant.callbacks.finish import Deployment, choose_weights, finish
from lightning_quant.callbacks.schedule import Schedule, Timeline, read_schedule, resolve
from lightning_quant.callbacks.states import state_of
from lightning_quant.callbacks.training_data import calibration_steps, working_copy
from lightning_quant.distributed import merge_batch
from lightning_quant.engines import AUTO
from lightning_quant.errors import QuantizationError
from lightning_quant.learned_steps import LearnedSteps
from lightning_quant.names import Engine, Example, Recipes, Runtime, Weights
from lightning_quant.observer_merge import check_mergeable
from lightning_quant.prepared import Prepared
from lightning_quant.recipe import Recipe
from lightning_quant.recorded_calls import recorded_calls
from lightning_quant.report.limits import Limits
from lightning_quant.routing import evaluation_mode
from lightning_quant.routing import resolve as module_at
from lightning_quant.sizes import ChosenShapes


class QuantizationAwareTraining(QuantizationCallback):
    """Train through rounding, and export an integer model when fit ends.

    Only the module's `forward` is routed to a graph with fake quantization while fit runs: type, parameters,
    `state_dict`, optimizers and checkpoints are those of the float model, and so is the module after fit, with weights
    that were trained through rounding.

    Args:
        recipe: numerics: a name out of `lightning_quant.recipe.RECIPES`, a `Recipe`, or a dict of its fields.
        runtime: where the artifact will run; "auto" tries every installed one when fit begins and takes the fastest
            whose parity holds, with what was measured in the report.
        module: name of the module to quantize; by default the outermost one with layers to quantize that
            `training_step` calls.
        output_dir: the artifact's folder; "quantized" beside the logs by default. An artifact there is replaced.
        schedule: when the phases of training begin.
        include: fnmatch patterns on qualified names and layer types of what may be quantized; one alone may be a text.
        exclude: likewise, of what stays float.
        example: what the call to export comes from: "train_batch", with the arguments that validation has where those
            differ; "predict_batch", with those of `predict_step`; or "example_input_array".
        weights: "last", or "best": the best checkpoint of ModelCheckpoint, weights and ranges from the same file.
        evaluate: whether to run the validation loop on float, simulated and exported model when fit ends.
        limit_eval_batches: number or share of validation batches for that; the trainer's limit by default.
        threads: for the latencies in the report; torch's number of threads by default.
        engine: whose kernels run on runtime "torch": by default the first whose parity holds, in an order of their own;
            "fastest" measures those whose parity holds, so that equal runs may end with different ones.
        dynamic_shapes: input name to dimension to its name, for dimensions beside the batch that may vary; "static"
            keeps all sizes of the captured call, the batch among them.
        sensitivity: whether the report says which operator costs what, with the trained weights and ranges; see
            `PostTrainingQuantization`. In one process.
        name: what its keys in loggers begin with: "quant/<name>/". By default "quant/", and where a Trainer has several
            of these callbacks "quant/<recipe>-<runtime>/".
        limits: what the artifact must keep to, such as `{"max_drop": {"val_f1": 0.01}, "max_size_ratio": 0.3}`, see
            `lightning_quant.report.limits.Limits`; one that is missed is a warning, and exit code 1 of every command.

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
        output_dir: str | Path | None = None,
        schedule: Schedule | dict[str, Any] | None = None,
        include: str | list[str] | tuple[str, ...] = ("*",),
        exclude: str | list[str] | tuple[str, ...] = (),
        example: Example = "train_batch",
        weights: Weights = "last",
        evaluate: bool = True,
        limit_eval_batches: int | float | None = None,
        threads: int | None = None,
        engine: Engine = "auto",
        dynamic_shapes: ChosenShapes = None,
        sensitivity: bool = False,
        name: str | None = None,
        limits: Limits | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            recipe,
            runtime,
            module=module,
            output_dir=output_dir,
            include=include,
            exclude=exclude,
            example=example,
            weights=weights,
            evaluate=evaluate,
            limit_eval_batches=limit_eval_batches,
            threads=threads,
            engine=engine,
            dynamic_shapes=dynamic_shapes,
            sensitivity=sensitivity,
            name=name,
            limits=limits,
        )
        if not self.recipe.needs_calibration:
            raise MisconfigurationException(
                f"Expected `recipe` to be one for training, such as 'int8', but got {self.recipe.name!r}, whose "
                "layers are quantized after training. Use PostTrainingQuantization."
            )
        self.schedule = _refused_in_callback(read_schedule, schedule)
        self.timeline = Timeline({}, in_epochs=False)
        # A checkpoint's state arrives before fit start, when there is nothing yet to put it into.
        self._restored: dict[str, Any] | None = None

    @override
    def observer(self) -> str:
        return self.recipe.training_observer

    @override
    def hyperparameters(self) -> dict[str, Any]:
        """Return what an artifact is made with, and when the phases of training begin."""
        points = {f"schedule/{name}": value for name, value in dataclasses.asdict(self.schedule).items()}
        return {**super().hyperparameters(), **{k: "never" if v == math.inf else v for k, v in points.items()}}

    def require_prepared(self) -> Prepared:
        """Return the prepared model, which has a graph: recipes of layers are refused."""
        return Prepared.of(super().require_prepared())

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit begins: capture, plan, trial export; take over the ranges of a resumed run."""
        if self._checkpoint is not None and self.runtime == AUTO:
            self._take_runtime(_refused_in_callback(self._state_in, self._checkpoint))
        super().on_fit_start(trainer, pl_module)
        _refused_in_callback(self._begin, trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before a training batch: set the phase and let ranges follow this batch."""
        phase = self.timeline.phase(trainer)
        if phase == "frozen_batch_norm" and is_updating_batch_norm(trainer):
            phase = "frozen"
        self._enter(phase, trainer)
        prepared = self.require_prepared()
        prepared.observing = True
        if prepared.quantizes:
            # Before the batch: what is compiled reads scales, and makes none.
            prepared.ranges.grids()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called before the user's optimizer moves weights: ours moves their learned scales."""
        prepared = self.require_prepared()
        if prepared.learned_steps is not None and prepared.quantizes:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            factor = 1.0 if scaler is None else 1.0 / scaler.get_scale()
            prepared.learned_steps.update(lambda grad: self.group.mean(grad) * factor)

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
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit ends: convert, export, measure, log."""
        self.require_prepared().detach()
        deployment = choose_weights(self, trainer, pl_module, with_ranges=True)
        self.trains_rounded = self.require_prepared().quantizes
        if not self.trains_rounded:
            note = "nothing was trained through rounding: the run ended before fake quantization began"
            warn(f"QuantizationAwareTraining: {note}.")
            deployment = replace(deployment, notes=(*deployment.notes, note))
        if self.require_prepared().recipe.batch_norm_batches > 0 and self.require_prepared().quantizes:
            self._reestimate(trainer, deployment)
        if self.sensitivity and self.require_prepared().quantizes:
            deployment = replace(deployment, sensitivity=self._rank(trainer, deployment))
        self.artifact = finish(self, trainer, deployment)

    def _reestimate(self, trainer: Trainer, deployment: Deployment) -> None:
        """Measure BatchNorm's statistics on a copy that may run the user's training step, and take them over."""
        duplicate = working_copy(trainer, deployment.pl_module)
        root = module_at(duplicate, self.path)
        prepared = Prepared.of(deployment.model).bound_to(root)
        number = self.require_prepared().recipe.batch_norm_batches
        steps = calibration_steps(trainer, duplicate, number, 0, "train")
        measured: dict[str, Tensor] = {}

        def noting() -> Iterator[Callable[[], Any]]:
            # The end of the steps puts the copy's buffers back.
            for step in steps:
                yield step
                measured.update({name: buffer.clone() for name, buffer in root.named_buffers()})

        reestimate_batch_norm(prepared, noting())
        for name, buffer in deployment.model.root.named_buffers():
            buffer.copy_(measured[name])

    def _rank(self, trainer: Trainer, deployment: Deployment) -> Sensitivity:
        """Measure every operator on training batches, which a copy may run the user's training step on."""
        duplicate = working_copy(trainer, deployment.pl_module)
        root = module_at(duplicate, self.path)
        with recorded_calls(root, NUM_CALLS) as calls, evaluation_mode(root), torch.no_grad():
            for step in calibration_steps(trainer, duplicate, NUM_CALLS, 0, "train"):
                step()
        return rank_operators(Prepared.of(deployment.model).bound_to(root), calls)

    def _begin(self, trainer: Trainer) -> None:
        prepared = self.require_prepared()
        if prepared.recipe.learned_step_rate > 0 and prepared.learned_steps is None:
            prepared.learned_steps = LearnedSteps(prepared.recipe.learned_step_rate)
        if self._checkpoint is not None:
            state = self._state_in(self._checkpoint)
            self.metrics_before = state.get("metrics_before", {})
            prepared.load_state_dict(state)
            return
        _check_others(self, trainer)
        self.timeline = resolve(self.schedule, trainer)
        prepared.ranges.waits = self.group.size > 1
        # Another forward in the way is found here, not when the first phase begins.
        prepared.attach()
        prepared.detach()
        self.metrics_before = (self._restored or {}).get("metrics_before", {})
        if self._restored is not None:
            prepared.load_state_dict(self._restored)
        elif trainer.ckpt_path:
            rank_zero_info(
                "QuantizationAwareTraining: the checkpoint has no quantizer state, so observing begins anew."
            )
        if prepared.phase != "off":
            prepared.attach()

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
            check_mergeable("training_observer", self.observer(), self.recipe, in_training=True)
        if self.group.size > 1 and self.sensitivity:
            raise QuantizationError(
                f"Expected one process for `sensitivity`, but got {self.group.size}. Train without it, and use "
                "`quantize_checkpoint` with it afterwards."
            )

    def _take_runtime(self, state: dict[str, Any]) -> None:
        """Go on with the runtime that was chosen when training began: it says which tensors have ranges."""
        if self.runtime == AUTO:
            self.chosen_runtime = state.get("runtime", "")

    def _state_in(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return this callback's state in a checkpoint; with other arguments than then, the only one of its kind."""
        states = {
            key: state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith(type(self).__name__)
        }
        state = state_of(self, states) or (next(iter(states.values())) if len(states) == 1 else None)
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
        if self.state_key not in states and (state := state_of(self, states)) is not None:
            self.load_state_dict(copy.deepcopy(state))

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.prepared is None:
            return self._restored or {}
        state = {"runtime": self.chosen_runtime, "metrics_before": self.metrics_before}
        return {**self.require_prepared().state_dict(), **state}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._restored = state_dict
        self._take_runtime(state_dict)
        if self.prepared is not None:
            self.require_prepared().load_state_dict(state_dict)


def is_updating_batch_norm(trainer: Trainer) -> bool:
    """Tell whether StochasticWeightAveraging runs its last epoch, which is there to measure BatchNorm anew."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def _check_others(callback: QuantizationAwareTraining, trainer: Trainer) -> None:
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(other, QuantizationAwareTraining) or other is callback or other.prepared is None:
            continue
        inner, outer = sorted((callback.path, other.path), key=len, reverse=True)
        if inner == outer or not outer or inner.startswith(f"{outer}."):
            raise QuantizationError(
                "Expected modules to be trained through one rounding each, but two QuantizationAwareTraining callbacks "
                f"train {inner!r}. Train with one, and let PostTrainingQuantization make the other artifact."
            )
