"""What quantization-aware training takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_quant.callbacks.schedule import Schedule, read_schedule
from lightning_quant.doors.settings import CallbackSettings
from lightning_quant.errors import QuantizationError
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.report.limits import NO_LIMITS, Limits, limits_from
from lightning_quant.simulate.distillation import Distill, read_distill

_ON_METRICS = ("max_drop", "higher_is_better", "lower_is_better")


@dataclass(frozen=True)
class TrainingSettings(CallbackSettings):
    """What quantization-aware training takes.

    Attributes:
        recipe: numerics: a name out of `lightning_quant.recipe.RECIPES`, a `Recipe`, or a dict of its fields; no recipe
            of layers.
        runtime: where the artifact will run; "auto" tries every installed one when fit begins and takes the fastest
            whose parity holds, with what was measured in the report.
        schedule: when the phases of training begin, as a `Schedule` or a dict of its fields.
        distill: how much the float forward of the present weights teaches the rounded one, beside the user's loss: a
            weight such as 0.5, or a dict of `weight`, `temperature`, for logits, and `layers`, patterns on names of
            those inside that are taught as well. It costs a forward of each step, and is for automatic optimization.
            By default as the recipe says, which is off in all that have names.
        only_if_needed: limits by the names of metrics, such as `{"val_acc": -0.005}`. Where the schedule would begin
            rounding, the weights are quantized without training, and the exported file is validated. When it keeps the
            limits, the run goes on in float, and the artifact is made without training through rounding; else that
            begins, with a forecast, and ends once the exported file keeps them. The last weights, the best ones and
            those of before rounding, quantized without training, are scored then, and the better are kept.
    """

    recipe: Recipe = field(default_factory=Recipe)
    schedule: Schedule = field(default_factory=Schedule)
    distill: Distill | None = None
    only_if_needed: Limits = NO_LIMITS

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hold("only_if_needed", needed_limits(self.only_if_needed, self.evaluate))
        if not self.recipe.needs_calibration:
            raise QuantizationError(
                f"Expected `recipe` to be one for training, such as 'int8', but got {self.recipe.name!r}, whose "
                "layers are quantized after training. Use PostTrainingQuantization."
            )
        self._hold("schedule", read_schedule(self.schedule))
        distill = read_distill(self.recipe.distill if self.distill is None else self.distill)
        self._hold("distill", distill if distill is not None and distill.weight > 0 else None)


def needed_limits(given: Any, evaluate: bool) -> Limits:
    """Return the limits that `only_if_needed` means; none where it is not given.

    Raises:
        QuantizationError: they are not on metrics, or there is nothing to measure metrics by.
    """
    limits = limits_from(given) if given is None or isinstance(given, Limits | Mapping) else None
    if limits is None or limits != Limits(
        limits.max_drop, higher_is_better=limits.higher_is_better, lower_is_better=limits.lower_is_better
    ):
        raise QuantizationError(
            f"Expected `only_if_needed` to be limits on metrics alone, such as {{'val_acc': -0.005}}, but got "
            f"{given!r:.80}. Bounds on size and speed are `limits`."
        )
    if limits.max_drop and not evaluate:
        raise QuantizationError(
            "Expected `only_if_needed` where validation runs on the exported file, but got `evaluate=False`."
        )
    return limits
