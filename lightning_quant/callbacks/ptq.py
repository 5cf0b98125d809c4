"""Post-training quantization as a callback."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_quant.accuracy.sensitivity import NUM_CALLS, Sensitivity, rank_operators
from lightning_quant.adjustments import outcomes
from lightning_quant.arguments import check_positive, from_fields
from lightning_quant.calibrate import calibrate
from lightning_quant.callbacks.base import QuantizationCallback, _refused_in_callback
from lightning_quant.callbacks.finish import choose_weights, finish
from lightning_quant.callbacks.training_data import calibration_steps, check_data, working_copy
from lightning_quant.choice import check_choice
from lightning_quant.distributed import calibrate_together
from lightning_quant.errors import QuantizationError
from lightning_quant.names import Data, DataName, Engine, Example, Recipes, Runtime, Weights
from lightning_quant.observer_merge import check_mergeable
from lightning_quant.prepared import Prepared
from lightning_quant.recipe import AnyRecipe
from lightning_quant.recorded_calls import recorded_calls
from lightning_quant.report.limits import Limits
from lightning_quant.routing import resolve
from lightning_quant.sizes import ChosenShapes


@dataclass(frozen=True)
class Calibration:
    """What ranges are learned from.

    Attributes:
        num_batches: how many batches.
        data: "train", or "validation" where that is wanted by name: metrics on data that chose the ranges flatter.
        seed: of shuffling and augmentation.
    """

    num_batches: int = 32
    data: Data = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("calibration.data", self.data, get_args(DataName))
        check_positive("calibration.num_batches", self.num_batches)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise QuantizationError(f"Expected `calibration.seed` to be an integer, but got {self.seed!r:.60}.")


class PostTrainingQuantization(QuantizationCallback):
    """Leave training alone, and when fit ends calibrate, export and measure an integer model.

    Args:
        recipe: numerics: a name out of `lightning_quant.recipe.RECIPES`, a `Recipe` or `LayerRecipe`, or a dict of
            fields. Recipes of layers (dynamic, weight-only, half precision) are not calibrated.
        runtime: where the artifact will run; "auto" tries every installed one when fit begins and takes the fastest
            whose parity holds, with what was measured in the report.
        module: name of the module to quantize; by default the outermost one with layers to quantize that
            `training_step` calls.
        output_dir: the artifact's folder; "quantized" beside the logs by default. An artifact there is replaced.
        calibration: which batches ranges are learned from.
        include: fnmatch patterns on qualified names and layer types of what may be quantized; one alone may be a text.
        exclude: likewise, of what stays float.
        example: what the call to export comes from: "train_batch", with the arguments that validation has where those
            differ; "predict_batch", with those of `predict_step`; or "example_input_array".
        weights: "last", or "best": those of ModelCheckpoint's best checkpoint.
        evaluate: whether to run the validation loop on float, simulated and exported model when fit ends.
        limit_eval_batches: number or share of validation batches for that; the trainer's limit by default.
        threads: for the latencies in the report; torch's number of threads by default.
        engine: whose kernels run on runtime "torch": by default the first whose parity holds, in an order of their own;
            "fastest" measures those whose parity holds, so that equal runs may end with different ones.
        dynamic_shapes: input name to dimension to its name, for dimensions beside the batch that may vary; "static"
            keeps all sizes of the captured call, the batch among them.
        sensitivity: whether the report says which operator costs what: it runs the module four to six times for each
            operator, on two calibration batches, and the validation loop twice for the worst one. For recipes that
            are calibrated, in one process.
        name: what its keys in loggers begin with: "quant/<name>/". By default "quant/", and where a Trainer has several
            of these callbacks "quant/<recipe>-<runtime>/".
        limits: what the artifact must keep to, such as `{"max_drop": {"val_f1": 0.01}, "max_size_ratio": 0.3}`, see
            `lightning_quant.report.limits.Limits`; one that is missed is a warning, and exit code 1 of every command.

    Raises:
        MisconfigurationException: before the first batch, when anything is known to fail, with the way out.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PostTrainingQuantization(output_dir="quantized")], logger=False)
    """

    def __init__(
        self,
        recipe: Recipes | dict[str, Any] | AnyRecipe = "int8",
        runtime: Runtime = "onnxruntime",
        *,
        module: str | None = None,
        output_dir: str | Path | None = None,
        calibration: Calibration | dict[str, Any] | None = None,
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
        self.calibration = _refused_in_callback(_calibration, calibration)

    @override
    def observer(self) -> str:
        return self.recipe.calibration_observer if self.recipe.needs_calibration else ""

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit ends: calibrate on the weights to export, then convert, export, measure, log."""
        deployment = choose_weights(self, trainer, pl_module, with_ranges=False)
        if self.recipe.needs_calibration:
            found = self._calibrate(trainer, Prepared.of(deployment.model), deployment.pl_module)
            steps = outcomes(deployment.model.accuracy_steps)
            deployment = replace(deployment, notes=(*deployment.notes, *steps), sensitivity=found)
        self.artifact = finish(self, trainer, deployment)

    @override
    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._prepare(trainer, pl_module)
        if self.recipe.needs_calibration:
            if self.group.size > 1:
                check_mergeable("calibration_observer", self.observer(), self.recipe, in_training=False)
            if self.group.size > 1 and (self.recipe.accuracy_steps or self.sensitivity):
                what = "`sensitivity` needs" if self.sensitivity else f"the accuracy steps of {self.recipe.name!r} need"
                raise QuantizationError(
                    f"Expected one process, but got {self.group.size}: {what} all batches in one. Use 'int8' without "
                    "`sensitivity`, or quantize the checkpoint afterwards with `quantize_checkpoint`."
                )
            check_data(
                trainer, pl_module, self.calibration.data, self.recipe.needed_calls, self.calibration.num_batches
            )

    def _calibrate(self, trainer: Trainer, deployed: Prepared, pl_module: LightningModule) -> Sensitivity | None:
        """Calibrate on the trainer's device, and measure there which operator costs what where that is wanted."""
        started = time.perf_counter()
        duplicate = working_copy(trainer, pl_module)
        prepared = deployed.bound_to(resolve(duplicate, self.path))
        chosen, group = self.calibration, self.group
        number = math.ceil(chosen.num_batches / group.size)

        def steps() -> Iterator[Callable[[], Any]]:
            return calibration_steps(trainer, duplicate, number, chosen.seed, chosen.data)

        with recorded_calls(prepared.root, NUM_CALLS if self.sensitivity else 0) as calls:
            if group.size == 1:
                calibrate(prepared, steps())
            else:
                calibrate_together(group, prepared, steps)
        deployed.take_over(prepared)
        self.seconds["calibrate"] = time.perf_counter() - started
        return rank_operators(prepared, calls) if self.sensitivity else None


def _calibration(given: Any) -> Calibration:
    """Return what `calibration=` means: batches of the Trainer's data, which ones it says itself."""
    if given is None or isinstance(given, Calibration):
        return given or Calibration()
    if isinstance(given, dict):
        return from_fields(Calibration, "calibration", given)
    number = given if isinstance(given, int) and not isinstance(given, bool) else 64
    raise QuantizationError(
        f"Expected `calibration` to be a dict such as {{'num_batches': {number}}}, but got {given!r:.60}. The batches "
        "are those of the Trainer's own data."
    )
