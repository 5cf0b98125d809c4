"""Quantization-aware training as a callback."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_quant.callbacks.base import QuantizationCallback, _refused_in_callback, warn
from lightning_quant.callbacks.finish import choose_weights, finish
from lightning_quant.callbacks.schedule import Schedule, Timeline, resolve
from lightning_quant.export import DynamicShapes
from lightning_quant.prepare import Prepared
from lightning_quant.recipe import LayerRecipe, Recipe


class QuantizationAwareTraining(QuantizationCallback):
    """Train through rounding, and export an integer model when fit ends.

    Only the module's `forward` is routed to a graph with fake quantization while fit runs: type, parameters,
    `state_dict`, optimizers and checkpoints are those of the float model, and so is the module after fit, with weights
    that were trained through rounding.

    Args:
        recipe: numerics: a name out of `lightning_quant.recipe.RECIPES`, a `Recipe`, or a dict of its fields.
        runtime: where the artifact will run.
        module: name of the module to quantize; by default the outermost one with convolution or linear layers that
            `training_step` calls.
        output_dir: the artifact's folder; "quantized" beside the logs by default. An artifact there is replaced.
        schedule: when the phases of training begin.
        include: fnmatch patterns on qualified names and layer types of what may be quantized.
        exclude: likewise, of what stays float.
        example: what the call to capture comes from: "train_batch" or "example_input_array".
        weights: "last", or "best": the best checkpoint of ModelCheckpoint, weights and ranges from the same file.
        evaluate: whether to run the validation loop on float, simulated and exported model when fit ends.
        limit_eval_batches: number or share of validation batches for that; the trainer's limit by default.
        threads: for the latencies in the report; torch's number of threads by default.
        dynamic_shapes: input name to dimension to its name, for dimensions beside the batch that may vary.

    Raises:
        MisconfigurationException: before the first batch, when anything is known to fail, with the way out.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[QuantizationAwareTraining(output_dir="quantized")], logger=False)
    """

    def __init__(
        self,
        recipe: str | dict[str, Any] | Recipe = "int8",
        runtime: str = "onnxruntime",
        *,
        module: str | None = None,
        output_dir: str | Path | None = None,
        schedule: Schedule | dict[str, Any] | None = None,
        include: list[str] | tuple[str, ...] = ("*",),
        exclude: list[str] | tuple[str, ...] = (),
        example: Literal["train_batch", "example_input_array"] = "train_batch",
        weights: Literal["last", "best"] = "last",
        evaluate: bool = True,
        limit_eval_batches: int | float | None = None,
        threads: int | None = None,
        dynamic_shapes: DynamicShapes | None = None,
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
            dynamic_shapes=dynamic_shapes,
        )
        if isinstance(self.recipe, LayerRecipe):
            raise MisconfigurationException(
                f"Expected `recipe` to be one to train through, such as 'int8', but got {self.recipe.name!r}, whose "
                "layers are quantized after training. Use PostTrainingQuantization."
            )
        given = Schedule() if schedule is None else schedule
        self.schedule = _refused_in_callback(lambda: Schedule(**given)) if isinstance(given, dict) else given
        self.timeline = Timeline({}, in_epochs=False)
        # A checkpoint's state arrives before fit start, when there is nothing yet to put it into.
        self._restored: dict[str, Any] | None = None

    @override
    def observer(self) -> str:
        return self.recipe.training_observer

    @override
    def require_prepared(self) -> Prepared:
        """Return the prepared model, which has a graph: recipes of layers are refused."""
        prepared = super().require_prepared()
        if not isinstance(prepared, Prepared):
            raise MisconfigurationException(f"Expected `recipe` to be one to train through, but got {self.recipe!r}.")
        return prepared

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit begins: capture, plan, trial export; then route the module's forward."""
        super().on_fit_start(trainer, pl_module)
        self.timeline = _refused_in_callback(resolve, self.schedule, trainer)
        if self._restored is not None:
            _refused_in_callback(self.require_prepared().load_state_dict, self._restored)
        elif trainer.ckpt_path:
            rank_zero_info(
                "QuantizationAwareTraining: the checkpoint has no quantizer state, so observing begins anew."
            )
        _refused_in_callback(self.require_prepared().attach)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before a training batch: set the phase and let ranges follow this batch."""
        prepared, phase = self.require_prepared(), self.timeline.phase(trainer)
        if phase != prepared.phase:
            prepared.set_phase(phase)
            rank_zero_info(f"QuantizationAwareTraining: {phase.replace('_', ' ')} from step {trainer.global_step}.")
        prepared.observing = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after a training batch: nothing outside training moves the ranges."""
        self.require_prepared().observing = False

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when training is interrupted: give the module its own forward back."""
        self.teardown(trainer, pl_module, "fit")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit ends: convert, export, measure, log."""
        self.require_prepared().detach()
        deployment = choose_weights(self, trainer, pl_module, with_ranges=True)
        if not self.require_prepared().quantizes:
            note = "nothing was trained through rounding: the run ended before fake quantization began"
            warn(f"QuantizationAwareTraining: {note}.")
            deployment = replace(deployment, notes=(*deployment.notes, note))
        self.artifact = finish(self, trainer, deployment)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.require_prepared().state_dict() if self.prepared is not None else self._restored or {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._restored = state_dict
        if self.prepared is not None:
            self.require_prepared().load_state_dict(state_dict)
