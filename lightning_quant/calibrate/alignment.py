"""Bring the channels of a tensor closer together where that costs the weights around it nothing.

One range for a tensor wastes the grid on channels that lie apart or are small. What no activation bounds is centered
channel by channel, and what only depthwise convolutions read is scaled channel by channel: their weights have a scale
for each channel, so no factor makes these coarser. Sources: Wei et al. 2023, arXiv:2304.09145 (shifting), and Xiao et
al. 2022, arXiv:2211.10438, equation 4, of whose magnitudes the square root is taken: the full ratio leaves the channels
no room for values above those that calibration saw. On a pretrained MobileNetV2 whose `int8` had 17 to 18 dB of 8
images, the full ratio came to 14 to 17 and the root to 20 to 23; of 128 images both came to 22.
"""

import functools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from lightning_quant.calibrate.absorption import middle
from lightning_quant.calibrate.calibrate import observe, settle
from lightning_quant.calibrate.distributed import Group
from lightning_quant.calibrate.fit import output_snrs, restore, snapshot
from lightning_quant.calibrate.groups import ScalingGroup, is_depthwise, scaling_groups
from lightning_quant.calibrate.recalibrate import recalibrate
from lightning_quant.calibrate.rescale import rescale
from lightning_quant.calibrate.smoothing import smoothing_factor, within_clip
from lightning_quant.calls.calls import Call
from lightning_quant.errors import NoEffectWarning
from lightning_quant.graph.plan import Operator
from lightning_quant.numerics.adjustments import AccuracyStep
from lightning_quant.numerics.bias_correction import InputMeans
from lightning_quant.numerics.exact import exact_arithmetic
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import device_of, evaluation_mode

_STRENGTH = 0.5
# Calls that judge it.
_NUM_JUDGES = 2


def alignable(prepared: Prepared, processes: Group | None = None) -> list[ScalingGroup]:
    """Return the groups of tensors that can be centered or scaled for nothing; finding any traces the module.

    Args:
        prepared: detached.
        processes: that all look, this one alone where nothing is said; where one of them fails, none finds any.
    """
    if not any(_is_candidate(prepared, i, o) for i, o in prepared.operators.items()):
        return []
    with _kept_as_calibrated(prepared):
        groups = (processes or Group()).together(scaling_groups, prepared)
        return [g for g in groups if g.can_shift or (is_depthwise(prepared, g) and not g.from_float)]
    return []


@contextmanager
def _kept_as_calibrated(prepared: Prepared) -> Iterator[None]:
    """Undo what a block has changed where it fails, with a warning: calibration is as good without it."""
    plain = snapshot(prepared)
    try:
        yield
    # Whatever a user's module raises when it is called once more: no artifact is lost for it.
    except Exception as error:
        restore(prepared, plain)
        message = f"Channels are not aligned, since that ended in {type(error).__name__}: {error}"
        warnings.warn(message, NoEffectWarning, stacklevel=2)


def _is_candidate(prepared: Prepared, identity: str, operator: Operator) -> bool:
    if not operator.weight:
        return False
    return prepared.weight(identity).shape[1] == 1 or (operator.quantized_output and not operator.activation)


@exact_arithmetic()
def align_channels(
    prepared: Prepared,
    groups: list[ScalingGroup],
    calls: list[Call],
    again: Callable[[], None] | None = None,
    processes: Group | None = None,
) -> AccuracyStep | None:
    """Center and scale groups, and calibrate again; all of it is undone where the output is no nearer to float's.

    Args:
        prepared: detached and calibrated.
        groups: from `alignable`.
        calls: of the module, which ranges are learned from.
        again: calibrates again, on these calls where nothing else is said.
        processes: those that have calls; this one alone where nothing is said.

    Returns:
        what came of it; None where no call of the module was seen, or one failed.
    """
    with _kept_as_calibrated(prepared):
        return _aligned(prepared, groups, calls, again, processes or Group())
    return None


def _aligned(
    prepared: Prepared,
    groups: list[ScalingGroup],
    calls: list[Call],
    again: Callable[[], None] | None,
    processes: Group,
) -> AccuracyStep | None:
    started, judges, plain = time.monotonic(), calls[:_NUM_JUDGES], snapshot(prepared)
    exact: list[Any] = []
    steps = [functools.partial(prepared.root, *args, **kwargs) for args, kwargs in calls]

    def judged() -> list[float]:
        return list(chain(*processes.gather(processes.together(output_snrs, prepared, judges, exact))))

    before = judged()
    if not before:
        return None
    ends = processes.maximum(processes.together(extremes, prepared, groups, steps))
    changed = processes.together(move, prepared, groups, ends)
    after = before
    if changed:
        again() if again else recalibrate(prepared, calls)
        after = judged()
    kept = mean(after) > mean(before)
    if not kept:
        restore(prepared, plain)
    seconds = time.monotonic() - started
    return AccuracyStep("align_channels", mean(before), mean(after), kept, changed, seconds, held_back=False)


def calibrate_aligned(prepared: Prepared, steps: Callable[[], Iterable[Callable[[], Any]]]) -> None:
    """Center and scale what can be, and calibrate then: two passes, and no judgement.

    Args:
        prepared: detached; its observers are updated, and no accuracy step is taken.
        steps: returns steps that call the module, the same ones each time.
    """
    groups = alignable(prepared) if prepared.recipe.align_channels else []
    if groups:
        with _kept_as_calibrated(prepared):
            move(prepared, groups, extremes(prepared, groups, steps()))
    means = InputMeans() if prepared.recipe.bias_correction else None
    settle(prepared, observe(prepared, steps(), means), means)


@torch.no_grad()
def extremes(prepared: Prepared, groups: list[ScalingGroup], steps: Iterable[Callable[[], Any]]) -> Tensor:
    """Return minus the least and the highest value of all channels in turn, `(2, channels)`; -inf where none was seen.

    Args:
        prepared: detached.
        groups: whose tensors these are.
        steps: each calls the module.
    """
    owners = {edge: group for group in groups for edge in group.edges}
    device = device_of(prepared.root)
    seen = {group: torch.full((2, group.channels), -torch.inf, device=device) for group in groups}

    def watch(identity: str, x: Tensor) -> None:
        group = owners.get(identity)
        if group is not None and x.numel():
            rows = prepared.on_grid(identity, x.float(), clipped=True).movedim(group.axis, -1).flatten(0, -2)
            seen[group] = torch.maximum(seen[group], torch.stack([-rows.amin(0), rows.amax(0)]))

    with evaluation_mode(prepared.root), prepared.simulation.watching(watch), prepared.attached("off"):
        for step in steps:
            step()
    return torch.cat(list(seen.values()), 1)


@torch.no_grad()
def move(prepared: Prepared, groups: list[ScalingGroup], ends: Tensor) -> int:
    """Center and scale groups by their extremes; return how many.

    Ranges and bias corrections belong to the old grids afterwards.
    """
    changed = 0
    for group, (below, high) in zip(groups, ends.split([group.channels for group in groups], 1), strict=True):
        if not bool(high.isfinite().all()):
            continue
        low = -below
        shift = middle(low, high) if group.can_shift else None
        factor = _factor(group, low, high, shift) if is_depthwise(prepared, group) else torch.ones_like(low)
        if shift is not None or bool((factor != 1).any()):
            rescale(prepared, group, factor, shift)
            changed += 1
    return changed


def _factor(group: ScalingGroup, low: Tensor, high: Tensor, shift: Tensor | None) -> Tensor:
    maximum = torch.maximum(low.abs(), high.abs()) if shift is None else (high - low) / 2
    maximum = maximum.clamp(max=group.clip)
    return within_clip(smoothing_factor(maximum, torch.ones_like(maximum), _STRENGTH), maximum, group.clip)
