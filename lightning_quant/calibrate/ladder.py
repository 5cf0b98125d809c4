"""Climb a ladder of accuracy algorithms; keep a step only when it lowers the error on calls it was not fitted to."""

import time
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

from lightning_quant.arguments.choice import did_you_mean
from lightning_quant.calibrate.fit import Fit, output_snrs, restore, snapshot
from lightning_quant.calibrate.steps import STEPS
from lightning_quant.calls.calls import Call
from lightning_quant.errors import CalibrationError, QuantizationError
from lightning_quant.numerics.adjustments import AccuracyStep
from lightning_quant.numerics.exact import exact_arithmetic
from lightning_quant.ranges.observers import Histogram, build
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.terminal.progress import bar

# Fitted to three quarters of the calls and judged on the other, with two of the quarters; or to halves of fewer calls.
# On halves, steps that need data are undone: a pretrained MobileNetV2 ended 2.6 dB lower with one of three draws, and
# with the others alike.
_NUM_FOLDS = 2
_NUM_PARTS = 4
# Share of samples of the first fold that a step may lose with before the second is spared.
_MOST_LOSERS = 0.75


@dataclass
class _Fold:
    """One way to part the calls.

    Attributes:
        fit: what steps are fitted to.
        judged: the other calls.
        state: snapshot of the model that the kept steps have made of `fit`.
        exact: what the float module answers to the other calls, as far as that is kept.
        reached: signal-to-noise ratio of every sample of the other calls, in that state.
    """

    fit: Fit
    judged: list[Call]
    state: tuple[Any, ...]
    exact: list[Any] = field(default_factory=list)
    reached: list[float] = field(default_factory=list)


@exact_arithmetic()
def climb(prepared: Prepared, calls: list[Call]) -> tuple[AccuracyStep, ...]:
    """Try the recipe's accuracy steps in order; return what came of each.

    Every step is fitted to most of the calls and judged on the others, twice; no call judges what was fitted to it.
    Those that are kept are then fitted to all calls, from the ranges that the model came with; should that raise the
    error of the calls that were judged on, all of them are undone.

    Args:
        prepared: detached and calibrated; keeps what the kept steps changed.
        calls: of the module, at least two.

    Raises:
        CalibrationError: there are fewer than two calls.
    """
    if len(calls) < _NUM_FOLDS:
        raise CalibrationError(
            f"Expected at least two calibration batches for recipe {prepared.recipe.name!r}, since a step is judged on "
            f"others than it is fitted to, but got {len(calls)}. Calibrate with more or smaller batches, or use recipe "
            "'int8'."
        )
    plain, folds = snapshot(prepared), _folds(prepared, calls)
    results: list[AccuracyStep] = []
    left = prepared.recipe.max_passes
    progress = bar("Accuracy", "step", items=prepared.recipe.accuracy_steps)
    for name in progress:
        # Twice on three quarters of the calls, on all where it is kept, and the judgement, float and rounded.
        passes = 2.5 * STEPS[name].passes + 2
        if passes <= left:
            left -= passes
            progress.set_postfix_str(name)
            results.append(_try(prepared, name, folds))
    restore(prepared, plain)
    kept = [step.name for step in results if step.kept]
    if kept and not _fit_to_all(prepared, kept, Fit(calls), folds):
        results = [replace(step, kept=False) for step in results]
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


def _folds(prepared: Prepared, calls: list[Call]) -> list[_Fold]:
    folds: list[_Fold] = []
    parts = max(_NUM_FOLDS, min(_NUM_PARTS, len(calls)))
    for number in range(_NUM_FOLDS):
        judged = calls[number::parts]
        others = [call for place, call in enumerate(calls) if place % parts != number]
        fit = Fit(others)
        fit.recalibrate(prepared)
        folds.append(_Fold(fit, judged, snapshot(prepared)))
        folds[-1].reached = _judge(prepared, folds[-1], folds[-1].state)
    return folds


def _judge(prepared: Prepared, fold: _Fold, state: tuple[Any, ...]) -> list[float]:
    """Return the signal-to-noise ratio of every sample that a state of the model was not fitted to."""
    restore(prepared, state)
    return output_snrs(prepared, fold.judged, fold.exact)


def _try(prepared: Prepared, name: str, folds: list[_Fold]) -> AccuracyStep:
    """Fit a step in each fold, and keep it in all of them or in none; return what came of it.

    A step with which most samples of the first fold lose is not fitted in the second, which would have to disagree.
    """
    started = time.monotonic()
    fits, states, changed = [], [], 0
    before: list[float] = []
    after: list[float] = []
    for fold in folds:
        restore(prepared, fold.state)
        fits.append(replace(fold.fit))
        number = STEPS[name].run(prepared, fits[-1])
        states.append(snapshot(prepared))
        before += fold.reached
        after += _judge(prepared, fold, states[-1]) if number else fold.reached
        changed = max(changed, number)
        if sum(new < old for old, new in zip(before, after, strict=True)) > _MOST_LOSERS * len(after):
            break
    kept = changed > 0 and len(states) == len(folds) and helps(before, after)
    if kept:
        reached = iter(after)
        for fold, fit, state in zip(folds, fits, states, strict=True):
            fold.fit, fold.state, fold.reached = fit, state, [next(reached) for _ in fold.reached]
    seconds = time.monotonic() - started
    return AccuracyStep(name, mean(before), mean(after), kept, changed, seconds)


def helps(before: list[float], after: list[float]) -> bool:
    """Tell whether samples gain on the whole, and not a few of them at the expense of most.

    Args:
        before: signal-to-noise ratio of each sample in decibels.
        after: the same after a step.
    """
    gains = [new - old for old, new in zip(before, after, strict=True)]
    return sum(gains) > 0 and 2 * sum(gain < 0 for gain in gains) <= len(gains)


def _fit_to_all(prepared: Prepared, kept: list[str], fit: Fit, folds: list[_Fold]) -> bool:
    """Fit the kept steps to all calls; undo them and return False where they raise the error of those judged on.

    What the float module answers to these is known.
    """
    plain = snapshot(prepared)
    before = [ratio for fold in folds for ratio in _judge(prepared, fold, plain)]
    for place, name in enumerate(kept):
        if not any(name in STEPS[later].includes for later in kept[place:]):
            STEPS[name].run(prepared, fit)
    reached = snapshot(prepared)
    is_better = mean(ratio for fold in folds for ratio in _judge(prepared, fold, reached)) > mean(before)
    if not is_better:
        restore(prepared, plain)
    return is_better
