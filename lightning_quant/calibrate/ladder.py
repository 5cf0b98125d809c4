"""Climb a ladder of accuracy algorithms; keep a step only when it lowers the error on held-back calibration data."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from lightning_quant.arguments.choice import did_you_mean
from lightning_quant.calibrate.absorption import absorb
from lightning_quant.calibrate.adaround import adaround
from lightning_quant.calibrate.equalization import equalize
from lightning_quant.calibrate.groups import ScalingGroup, scaling_groups
from lightning_quant.calibrate.output_correction import correct_outputs
from lightning_quant.calibrate.range_choice import choose_ranges
from lightning_quant.calibrate.recalibrate import recalibrate
from lightning_quant.calibrate.smoothing import smooth
from lightning_quant.calibrate.weight_rounding import gptq_layers, shrink_scales
from lightning_quant.calls.calls import Call
from lightning_quant.errors import CalibrationError, QuantizationError
from lightning_quant.numerics.adjustments import AccuracyStep
from lightning_quant.numerics.exact import exact_arithmetic
from lightning_quant.numerics.noise import alike, signal_to_noise
from lightning_quant.ranges.observers import Histogram, build
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode
from lightning_quant.terminal.progress import bar

HELD_BACK_EVERY = 4
# How much of the difficulty of an activation moves into the weights that read it.
ALPHAS = (0.35, 0.5, 0.65, 0.8, 0.95)


@dataclass
class Budget:
    """What a step may use.

    Attributes:
        calls: calls of the module to fit to.
        deadline: `time.monotonic()` at which to stop.
        corrects_outputs: whether biases are corrected by the outputs of the quantized model; a step that changes
            anything has to do that again.
    """

    calls: list[Call]
    deadline: float
    corrects_outputs: bool = False

    @property
    def is_spent(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self.deadline


@exact_arithmetic()
def climb(prepared: Prepared, calls: list[Call]) -> tuple[AccuracyStep, ...]:
    """Try the recipe's accuracy steps in order; return what came of each.

    Every fourth call is held back: no step sees it, and it decides. Ranges and bias corrections are then learned from
    all calls.

    Args:
        prepared: detached and calibrated; keeps what the kept steps changed.
        calls: of the module, at least two.

    Raises:
        CalibrationError: there are fewer than two calls.
    """
    if len(calls) < 2:
        raise CalibrationError(
            f"Expected at least two calibration batches for recipe {prepared.recipe.name!r}, one of them to be held "
            f"back, but got {len(calls)}. Calibrate with more or smaller batches, or use recipe 'int8'."
        )
    held_back = calls[HELD_BACK_EVERY - 1 :: HELD_BACK_EVERY] or calls[-1:]
    kept = [call for call in calls if not any(call is other for other in held_back)]
    budget = Budget(kept, time.monotonic() + prepared.recipe.time_budget_s)
    recalibrate(prepared, budget.calls)
    results: list[AccuracyStep] = []
    reached = output_snr(prepared, held_back)
    progress = bar("Accuracy", "step", items=prepared.recipe.accuracy_steps)
    for name in progress:
        if budget.is_spent:
            break
        progress.set_postfix_str(name)
        results.append(_try(prepared, name, budget, held_back, reached))
        reached = results[-1].after_db if results[-1].kept else reached
    _learn_from_all(prepared, budget, calls, is_changed=any(step.kept for step in results))
    return tuple(results)


def check_steps(recipe: Recipe) -> None:
    """Refuse accuracy steps that are known to fail.

    Raises:
        QuantizationError: a step has an unknown name, or chooses ranges without the histograms for it.
    """
    unknown = [name for name in recipe.accuracy_steps if name not in STEPS]
    if unknown:
        hint = did_you_mean(unknown[0], STEPS)
        raise QuantizationError(f"Expected `accuracy_steps` out of {sorted(STEPS)}, but got {unknown}.{hint}")
    observer = build(recipe.calibration_observer, recipe)
    if "choose_ranges" in recipe.accuracy_steps and not isinstance(observer, Histogram):
        raise QuantizationError(
            "Expected `calibration_observer` to be 'mse' or 'percentile' for the accuracy step 'choose_ranges', but "
            f"got {recipe.calibration_observer!r}."
        )


def _try(prepared: Prepared, name: str, budget: Budget, held_back: list[Call], before: float) -> AccuracyStep:
    started = time.monotonic()
    saved = snapshot(prepared)
    corrected = budget.corrects_outputs
    changed = STEPS[name](prepared, budget)
    after = output_snr(prepared, held_back)
    kept = changed > 0 and after > before
    if not kept:
        restore(prepared, saved)
        budget.corrects_outputs = corrected
    return AccuracyStep(name, before, after, kept, changed, time.monotonic() - started)


@torch.no_grad()
def output_snr(prepared: Prepared, calls: list[Call]) -> float:
    """Return signal over noise of the quantized module's output on calls, in decibels."""
    with evaluation_mode(prepared.root):
        exact = [prepared.root(*args, **kwargs) for args, kwargs in calls]
        with prepared.attached("frozen"):
            quantized = [prepared.root(*args, **kwargs) for args, kwargs in calls]
    return signal_to_noise(*alike(exact, quantized))


def snapshot(prepared: Prepared) -> tuple[object, ...]:
    """Return what `restore` needs to undo steps; layers and ranges are replaced by steps, never written into."""
    dicts = tuple(dict(d) for d in (prepared.layers, prepared.channels, prepared.bias_corrections))
    return (*dicts, prepared.ranges, dict(prepared.ranges.chosen))


def restore(prepared: Prepared, saved: tuple[object, ...]) -> None:
    """Undo everything since a snapshot."""
    prepared.layers, prepared.channels, prepared.bias_corrections, prepared.ranges = saved[:4]  # type: ignore[assignment]
    prepared.ranges.chosen = saved[4]  # type: ignore[assignment]
    prepared.ranges.forget_parameters()


def is_depthwise(prepared: Prepared, group: ScalingGroup) -> bool:
    """Tell whether each reader of a group has one input channel for each output: scaling costs its weights nothing."""
    return all(prepared.weight(identity).shape[1] == 1 for identity in group.consumers) and group.channels > 1


def _refresh(prepared: Prepared, budget: Budget, calls: list[Call]) -> None:
    """Learn ranges and bias corrections again, after layers or channel scales have changed."""
    recalibrate(prepared, calls)
    if budget.corrects_outputs:
        correct_outputs(prepared, calls)


def _learn_from_all(prepared: Prepared, budget: Budget, calls: list[Call], *, is_changed: bool) -> None:
    """Learn ranges and bias corrections from all calls, once no step has to be judged any more.

    So that a ladder on which no step helped ends where it began, and few calls are not fewer still. Kept steps have
    fitted channel scales and integers to the ranges before, so there it must not raise the error on these calls.
    """
    saved, before = snapshot(prepared), output_snr(prepared, calls)
    has_choice = bool(prepared.ranges.chosen)
    recalibrate(prepared, calls)
    if has_choice:
        choose_ranges(prepared, calls)
    if budget.corrects_outputs:
        correct_outputs(prepared, calls)
    if is_changed and output_snr(prepared, calls) < before:
        restore(prepared, saved)


def _correct_outputs(prepared: Prepared, budget: Budget) -> int:
    budget.corrects_outputs = True
    return correct_outputs(prepared, budget.calls)


def _scale_depthwise(prepared: Prepared, budget: Budget) -> int:
    groups = [g for g in scaling_groups(prepared) if not g.from_float and is_depthwise(prepared, g)]
    number = smooth(prepared, groups, budget.calls)
    _refresh(prepared, budget, budget.calls)
    return number


def _smooth_each(groups: Iterable[ScalingGroup], prepared: Prepared, budget: Budget) -> int:
    """Smooth one group after the other, each only if that lowers the output's error on the calls to fit to."""
    calls, number = budget.calls, 0
    _refresh(prepared, budget, calls[:1])
    best = output_snr(prepared, calls[:1])
    for group in groups:
        if budget.is_spent:
            break
        saved = snapshot(prepared)
        smooth(prepared, [group], calls[:1])
        _refresh(prepared, budget, calls[:1])
        error = output_snr(prepared, calls[:1])
        if error > best:
            best, number = error, number + 1
        else:
            restore(prepared, saved)
    _refresh(prepared, budget, calls)
    return number


def _migrate(prepared: Prepared, budget: Budget) -> int:
    """Smooth what linear layers read of float operators in a net with LayerNorm, with the best of some strengths.

    All at once, not one after the other: in a transformer the errors of all layers hide what one of them gains.
    """
    groups = [g for g in scaling_groups(prepared) if g.from_float and not g.links and _is_linear(prepared, g)]
    if not any(group.normalized for group in groups):
        return 0
    few = budget.calls[:2]
    best, found = output_snr(prepared, few), snapshot(prepared)
    before = found
    for alpha in ALPHAS:
        if budget.is_spent:
            break
        restore(prepared, before)
        smooth(prepared, groups, budget.calls, alpha=alpha)
        _refresh(prepared, budget, budget.calls)
        error = output_snr(prepared, few)
        if error > best:
            best, found = error, snapshot(prepared)
    restore(prepared, found)
    return 0 if found is before else len(groups)


def _is_linear(prepared: Prepared, group: ScalingGroup) -> bool:
    return all(prepared.operators[identity].kind == "linear" for identity in group.consumers)


def _smooth(prepared: Prepared, budget: Budget) -> int:
    return _smooth_each(
        [g for g in scaling_groups(prepared) if not g.links and not is_depthwise(prepared, g)], prepared, budget
    )


def _smooth_sums(prepared: Prepared, budget: Budget) -> int:
    return _smooth_each(
        [g for g in scaling_groups(prepared) if g.links and not is_depthwise(prepared, g)], prepared, budget
    )


def _equalize(prepared: Prepared, budget: Budget) -> int:
    number = equalize(prepared, scaling_groups(prepared), budget.calls)
    _refresh(prepared, budget, budget.calls)
    return number


def _absorb(prepared: Prepared, budget: Budget) -> int:
    number = len(absorb(prepared, scaling_groups(prepared), budget.calls))
    _refresh(prepared, budget, budget.calls)
    return number


def _choose_ranges(prepared: Prepared, budget: Budget) -> int:
    # Ranges with a choice of their own belong to the grids; observing anew would forget it.
    number = choose_ranges(prepared, budget.calls)
    if budget.corrects_outputs:
        correct_outputs(prepared, budget.calls)
    return number


def _adaround(prepared: Prepared, budget: Budget) -> int:
    results = adaround(prepared, budget.calls, deadline=budget.deadline)
    if budget.corrects_outputs:
        correct_outputs(prepared, budget.calls)
    return sum(result.learned < result.nearest for result in results)


def _shrink_scales(prepared: Prepared, budget: Budget) -> int:
    number = shrink_scales(prepared)
    _refresh(prepared, budget, budget.calls)
    return number


def _gptq(prepared: Prepared, budget: Budget) -> int:
    number = gptq_layers(prepared, budget.calls)
    if budget.corrects_outputs:
        correct_outputs(prepared, budget.calls)
    return number


STEPS: dict[str, Callable[[Prepared, Budget], int]] = {
    "scale_depthwise": _scale_depthwise,
    "migrate": _migrate,
    "smooth": _smooth,
    "smooth_sums": _smooth_sums,
    "equalize": _equalize,
    "absorb": _absorb,
    "choose_ranges": _choose_ranges,
    "correct_outputs": _correct_outputs,
    "shrink_scales": _shrink_scales,
    "gptq": _gptq,
    "adaround": _adaround,
}
