"""How far rounding ties alone bring a model from itself: several runs of the simulation with its ties tipped."""

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.graph.plan import identify
from lightning_quant.numerics.noise import alike, signal_to_noise
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode

# Share of a step within which a value counts as lying on a tie.
_NEAR = 1e-3
# Half of them move each value by an amount of its own, half all values of a tensor alike, as a kernel's factor does.
NUM_DRAWS = 8
# Standard deviations above the mean beyond which one more draw lies once in a thousand times: Student's t with seven
# degrees of freedom, 4.785, times sqrt(1 + 1 / 8) for the mean's own error.
_DEVIATIONS = 5.07


def off_ties(prepared: Prepared, tensors: list[Tensor]) -> list[Tensor]:
    """Return inputs of a call, those on a rounding tie moved off it: towards zero, by a hundredth of a step.

    Pixels of few levels lie on ties by the thousand, all of which an engine rounds its own way: that would hide what it
    computes otherwise.
    """
    return [_off_ties(prepared, name, x) for name, x in zip(prepared.spec.names, tensors, strict=True)]


def _off_ties(prepared: Prepared, name: str, x: Tensor) -> Tensor:
    identity = identify("", name)
    if identity not in prepared.ranges.edges or identity in prepared.channels or not x.is_floating_point():
        return x
    scale = prepared.ranges.parameters(identity)[0].to(x.device, x.dtype)
    from_tie = (x.abs() / scale).frac() - 0.5
    return torch.where(from_tie.abs() < _NEAR, x - x.sign() * scale / 100, x)


@torch.no_grad()
def tipped_ties(prepared: Prepared, args: tuple[Any, ...], kwargs: dict[str, Any], simulated: Any) -> tuple[float, ...]:
    """Return the signal-to-noise ratios of a simulated result against itself with its ties tipped, in decibels.

    Kernels multiply in orders of their own, and in a deep network each tie that this tips spreads. One run is one draw
    of that noise; their spread says how far another engine may be.
    """
    draws = []
    with torch.random.fork_rng(devices=[]), evaluation_mode(prepared.root):
        for draw in range(NUM_DRAWS):
            with prepared.attached("frozen"), prepared.simulation.jittering(draw):
                tipped = prepared.root(*args, **kwargs)
            draws.append(signal_to_noise(*alike(tensor_leaves(simulated), tensor_leaves(tipped))))
    return tuple(draws)


def farthest(draws: tuple[float, ...]) -> float:
    """Return the signal-to-noise ratio, in decibels, below which ties alone bring a model once in a thousand times.

    Noise powers add up over tipped ties, so mean and deviation are those of the powers; infinite without any noise.
    """
    powers = [10 ** (-decibels / 10) for decibels in draws if not math.isnan(decibels)]
    if not any(powers):
        return math.inf
    return -10 * math.log10(statistics.fmean(powers) + _DEVIATIONS * statistics.stdev(powers))
