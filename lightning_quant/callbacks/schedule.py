"""When each phase of quantization-aware training begins."""

import math
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from lightning_quant.arguments.arguments import from_fields
from lightning_quant.arguments.choice import check_choice
from lightning_quant.arguments.keywords import known_arguments
from lightning_quant.arguments.names import Unit, UnitName
from lightning_quant.errors import QuantizationError


@known_arguments
@dataclass(frozen=True)
class Schedule:
    """The points of a training run at which its phases begin: observe, fake quantize, freeze ranges, freeze BatchNorm.

    The defaults suit a fine-tune of two epochs and a training of a hundred alike: ranges are observed while weights
    settle, most of the run trains through rounding, and the end trains what will be exported.

    Attributes:
        observe: start of observing; before it the model trains in float at no cost.
        fake_quantize: start of rounding; ranges go on following the data.
        freeze_observers: start of fixed ranges.
        freeze_batch_norm: start of BatchNorm using its running statistics, which then stay as they are; never by
            default. It wants a learning rate that has come down: at a constant one, networks have collapsed within an
            epoch, in float as well.
        anneal_bits_until: point until which grids narrow: rounding then begins with eight bits for weights and
            activations, and takes one away after another, in equal times, until here they have the recipe's. Learned
            steps begin anew with each. None begins with the recipe's. Scores and files have the recipe's at any time.
        unit: "fraction" of the run, in [0, 1]; "epochs", or "steps" of the optimizer, counted from the run's beginning.
    """

    observe: float = 0.0
    fake_quantize: float = 0.2
    freeze_observers: float = 0.8
    freeze_batch_norm: float = math.inf
    anneal_bits_until: float | None = None
    unit: Unit = "fraction"

    def __post_init__(self) -> None:
        points = (self.observe, self.fake_quantize, self.narrow, self.freeze_observers, self.freeze_batch_norm)
        check_choice("schedule.unit", self.unit, get_args(UnitName))
        if any(isinstance(point, bool) or not isinstance(point, int | float) for point in points):
            raise QuantizationError(f"Expected the points of `schedule` to be numbers, but got {points}.")
        if self.unit == "fraction" and self.fake_quantize >= 1:
            raise QuantizationError(
                f"Expected `schedule` to reach fake quantization in this run, but `fake_quantize` is "
                f"{self.fake_quantize} of it. Choose a fraction below 1, or say what it counts, as unit='epochs'."
            )
        if min(points) < 0 or list(points) != sorted(points):
            names = ("observe", "fake_quantize", "anneal_bits_until", "freeze_observers", "freeze_batch_norm")
            named = [(n, p) for n, p in zip(names, points, strict=True) if getattr(self, n) is not None]
            got = ", ".join(f"{name} {point:g}" for name, point in named)
            default = f" Say in {self.unit} when `freeze_observers` is due." if self.freeze_observers == 0.8 else ""
            raise QuantizationError(
                f"Expected the points of `schedule` to be positive and in order, but got {got}.{default}"
            )

    @property
    def narrow(self) -> float:
        """From when on grids have the recipe's bits, where rounding has begun."""
        return self.fake_quantize if self.anneal_bits_until is None else self.anneal_bits_until


def read_schedule(given: Any) -> Schedule:
    """Return the schedule that `schedule=` means: one, or the fields of one.

    Raises:
        QuantizationError: it is neither, or a field or its value is wrong.
    """
    if given is None or isinstance(given, Schedule):
        return given or Schedule()
    if not isinstance(given, dict):
        raise QuantizationError(
            "Expected `schedule` to be a dict such as {'fake_quantize': 2, 'freeze_observers': 8, 'unit': 'epochs'}, "
            f"but got {given!r:.60}."
        )
    return from_fields(Schedule, "schedule", given)


@dataclass(frozen=True)
class Timeline:
    """A schedule in training batches, or in epochs where their length is unknown.

    Attributes:
        starts: phase to the position at which it begins.
        in_epochs: whether positions count epochs.
        end: of the run; infinite where nobody knows.
        narrow: from when on grids have the recipe's bits.
    """

    starts: dict[str, float]
    in_epochs: bool
    end: float = math.inf
    narrow: float = 0.0

    def phase(self, trainer: Any) -> str:
        """Return the phase of the batch that a trainer is about to run."""
        position = self._position(trainer)
        current = "off"
        for phase, start in self.starts.items():
            if position >= start:
                current = phase
        return current

    def progress(self, trainer: Any) -> float:
        """Return how much of the training through rounding is done, in [0, 1]; all of it where its end is unknown."""
        start = self.starts["fake_quantize"]
        return (self._position(trainer) - start) / (self.end - start) if math.isfinite(self.end) else 1.0

    def width(self, trainer: Any) -> float:
        """Return how much of the bits between the recipe's and eight grids still have, in [0, 1]."""
        start, left = self.starts["fake_quantize"], self.narrow - self._position(trainer)
        return min(left / (self.narrow - start), 1.0) if left > 0 and self.narrow > start else 0.0

    def _position(self, trainer: Any) -> float:
        return trainer.current_epoch if self.in_epochs else trainer.fit_loop.epoch_loop.total_batch_idx


def timeline_of(schedule: Schedule, trainer: Any) -> Timeline:
    """Turn a schedule into positions of one trainer's run.

    Raises:
        QuantizationError: fake quantization would never begin, or a fraction of an endless run was asked for.
    """
    batches = trainer.num_training_batches
    ends = []
    if trainer.max_epochs not in (None, -1):
        ends.append(trainer.max_epochs * batches)
    if trainer.max_steps not in (None, -1):
        ends.append(_batches_of(trainer.max_steps, trainer))
    end = min(ends, default=math.inf)
    in_epochs = not math.isfinite(end) and not math.isfinite(batches) and schedule.unit != "steps"
    if in_epochs:
        end = float(trainer.max_epochs or math.inf)
    if schedule.unit == "fraction" and not 0 < end < math.inf:
        raise QuantizationError(
            "Expected a run of known length for `schedule.unit` 'fraction', but it has neither `max_epochs` nor "
            "`max_steps`. Set one of them, or give the schedule in 'epochs' or 'steps'."
        )
    points = {
        "observe": schedule.observe,
        "fake_quantize": schedule.fake_quantize,
        "frozen": schedule.freeze_observers,
        "frozen_batch_norm": schedule.freeze_batch_norm,
        "narrow": schedule.narrow,
    }
    if schedule.unit == "steps":
        starts = {phase: _batches_of(point, trainer) for phase, point in points.items()}
    else:
        factor = end if schedule.unit == "fraction" else 1 if in_epochs else batches
        starts = {phase: _start(point, factor) for phase, point in points.items()}
    if schedule.unit == "fraction":
        # A run of a few batches still ends in rounding: `fast_dev_run` must try what the real run will do.
        starts["fake_quantize"] = min(starts["fake_quantize"], max(end - 1, 0))
    if starts["fake_quantize"] >= end:
        raise QuantizationError(
            f"Expected `schedule` to reach fake quantization in this run, but it begins at {schedule.fake_quantize:g} "
            f"{schedule.unit} and the run ends before. Train longer or begin earlier."
        )
    narrow = starts.pop("narrow")
    return Timeline(starts, in_epochs, end, narrow)


def _start(point: float, factor: float) -> float:
    return math.ceil(point * factor - 1e-9) if 0 < point < math.inf else point


def _batches_of(steps: float, trainer: Any) -> float:
    """Return after how many batches that many optimizer steps are done; the last batches of an epoch make one too."""
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    if not math.isfinite(batches) or not math.isfinite(steps):
        return steps * accumulate
    epochs, rest = divmod(math.ceil(steps), math.ceil(batches / accumulate))
    return epochs * batches + rest * accumulate


def is_updating_batch_norm(trainer: Any) -> bool:
    """Tell whether StochasticWeightAveraging runs its last epoch, which is there to measure BatchNorm anew."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def rate_of(trainer: Any, optimizer: Any) -> tuple[int, float]:
    """Return which optimizer of a run it is, and its learning rate now, the highest of its groups; 1 without any."""
    number = next((n for n, other in enumerate(trainer.optimizers) if other is optimizer), 0)
    rates = [group.get("lr") for group in optimizer.param_groups]
    return number, max((float(rate) for rate in rates if isinstance(rate, int | float | Tensor)), default=1.0)
