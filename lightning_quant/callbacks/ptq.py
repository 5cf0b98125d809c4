"""Post-training quantization as a callback."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_quant.arguments.arguments import check_positive, from_fields
from lightning_quant.arguments.choice import check_choice
from lightning_quant.arguments.keywords import known_arguments
from lightning_quant.arguments.names import (
    Data,
    DataName,
    Engine,
    Example,
    Recipes,
    Runtime,
    ScoreWith,
    SeveralRecipes,
    SeveralRuntimes,
    Weights,
)
from lightning_quant.calibrate.calibrate import calibrate
from lightning_quant.calibrate.distributed import calibrate_together
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.deployment import choose_weights
from lightning_quant.callbacks.finish import finish
from lightning_quant.callbacks.float_metrics import float_metrics
from lightning_quant.callbacks.refusals import refused_in_callback
from lightning_quant.callbacks.replay import recorded_steps, replayed
from lightning_quant.callbacks.searching import Recorded, calibrated_and_recorded, searched
from lightning_quant.callbacks.shared import Alone
from lightning_quant.callbacks.training_data import calibration_steps, check_data, working_copy
from lightning_quant.calls.recorded_calls import recorded_calls
from lightning_quant.doors.settings import CallbackSettings, documented
from lightning_quant.doors.several import is_several
from lightning_quant.errors import QuantizationError
from lightning_quant.machine.timed import timed
from lightning_quant.measure.attempts import noting
from lightning_quant.measure.contributions import Metrics
from lightning_quant.measure.sensitivity import NUM_CALLS, Sensitivity, rank_operators
from lightning_quant.numerics.adjustments import outcomes
from lightning_quant.planned.sizes import ChosenShapes
from lightning_quant.ranges.observer_merge import check_mergeable
from lightning_quant.recipe.recipe import AnyRecipe
from lightning_quant.report.limits import Limits
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import resolve


@known_arguments
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


@dataclass(frozen=True)
class CalibrationSettings(CallbackSettings):
    """What post-training quantization takes.

    Attributes:
        calibration: which batches ranges are learned from, as a dict of `num_batches`, `data` ("train", or "validation"
            where that is wanted by name) and `seed`.
    """

    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hold("calibration", _calibration(self.calibration))


@documented(CalibrationSettings)
class PostTrainingQuantization(QuantizationCallback):
    """Leave training alone, and when fit ends calibrate, export and measure an integer model.

    Raises:
        MisconfigurationException: before the first batch, when anything is known to fail, with the way out.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PostTrainingQuantization(output_dir="quantized")], logger=False)
    """

    def __init__(
        self,
        recipe: SeveralRecipes | Recipes | dict[str, Any] | AnyRecipe = "int8",
        runtime: SeveralRuntimes | Runtime = "onnxruntime",
        *,
        module: str | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        calibration: Calibration | dict[str, Any] | None = None,
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
        # Metrics of the artifact, with what each batch adds to them where several artifacts are compared.
        self.measured: Metrics | None = None
        if type(self) is PostTrainingQuantization and is_several(recipe, runtime):
            from lightning_quant.callbacks.sweeping import SweepingQuantization

            # Not in `__new__`, whose signature would stand for this one wherever arguments are read from it.
            self.__class__ = SweepingQuantization
            cast(SweepingQuantization, self).begin(locals())
            return
        super().__init__(refused_in_callback(CalibrationSettings.of, locals()))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "measured": None}

    @property
    @override
    def settings(self) -> CalibrationSettings:
        return CalibrationSettings.of(vars(self))

    @property
    def is_member(self) -> bool:
        """Whether other recipes or runtimes make artifacts of the same training."""
        return not isinstance(self.shared, Alone)

    @override
    def observer(self) -> str:
        recipe = self.settings.recipe
        return recipe.calibration_observer if recipe.needs_calibration else ""

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit ends: calibrate on the weights to export, then convert, export, measure, log."""
        deployment, recorded = choose_weights(self, trainer, pl_module, with_ranges=False), None
        if self.settings.recipe.needs_calibration:
            sensitivity, recorded = self._calibrate(trainer, Prepared.of(deployment.model), deployment.pl_module)
            deployment = replace(deployment, sensitivity=sensitivity)
        if self.settings.searches:
            deployment = searched(self, trainer, deployment, recorded)
        elif self.is_member:
            deployment = replace(deployment, known=float_metrics(self, trainer, deployment))
        steps = outcomes(deployment.model.accuracy_steps)
        self.artifact = finish(self, trainer, replace(deployment, notes=(*deployment.notes, *steps)))
        if self.is_member and deployment.known is not None:
            self.measured = deployment.known.files.get(self.artifact.model_digest, (None, None))[0]

    @override
    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._prepare(trainer, pl_module)
        settings = self.settings
        recipe, calibration = settings.recipe, settings.calibration
        if recipe.needs_calibration:
            if self.group.size > 1:
                check_mergeable("calibration_observer", self.observer(), recipe, in_training=False)
            if self.group.size > 1 and (recipe.accuracy_steps or settings.sensitivity):
                what = "`sensitivity` needs" if settings.sensitivity else f"the accuracy steps of {recipe.name!r} need"
                raise QuantizationError(
                    f"Expected one process, but got {self.group.size}: {what} all batches in one. Use 'int8' without "
                    "`sensitivity`, or quantize the checkpoint afterwards with `quantize_checkpoint`."
                )
            check_data(trainer, pl_module, calibration.data, recipe.needed_calls, calibration.num_batches)

    def _calibrate(
        self, trainer: Trainer, deployed: Prepared, pl_module: LightningModule
    ) -> tuple[Sensitivity | None, Recorded | None]:
        """Calibrate on the trainer's device, and measure there which operator costs what where that is wanted."""
        settings, recorded = self.settings, None
        duplicate = working_copy(trainer, pl_module)
        prepared = deployed.bound_to(resolve(duplicate, self.path))
        chosen, group = settings.calibration, self.group
        number = math.ceil(chosen.num_batches / group.size)

        more = NUM_CALLS if settings.searches else 0

        def read() -> Iterator[Callable[[], Any]]:
            return calibration_steps(trainer, duplicate, number + more, chosen.seed, chosen.data)

        def steps() -> Iterator[Callable[[], Any]]:
            if not self.is_member or group.size > 1:
                return read()
            again = self.shared.once(("calls", self.path), lambda: recorded_steps(prepared.root, read(), number + more))
            return read() if again is None else replayed(duplicate, prepared.root, again, chosen.seed)

        few = NUM_CALLS if settings.sensitivity else 0
        with recorded_calls(prepared.root, few) as calls, timed(self.seconds, "calibrate"):
            if settings.searches:
                recorded = calibrated_and_recorded(prepared, steps(), number)
            elif group.size == 1:
                calibrate(prepared, steps())
            else:
                calibrate_together(group, prepared, steps)
        deployed.take_over(prepared)
        ranked = None
        if settings.sensitivity:
            with noting(self.missing, "sensitivities are"):
                ranked = rank_operators(prepared, calls)
        return ranked, recorded


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
