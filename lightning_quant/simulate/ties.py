"""How far rounding ties alone bring a model from itself: several runs of the simulation with its ties tipped."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.graph.plan import identify
from lightning_quant.numerics.noise import alike, signal_to_noise, unequal_integers
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode

# Share of a step within which a value counts as lying on a tie.
_NEAR = 1e-3
# Half of them move each value by an amount of its own, half all values of a tensor alike, as a kernel's factor does.
NUM_DRAWS = 8
# Standard deviations above the mean beyond which one more draw lies once in a thousand times: Student's t with seven
# degrees of freedom, 4.785, times sqrt(1 + 1 / 8) for the mean's own error.
_DEVIATIONS = 5.07
# PyTorch's functions that answer which of several values it is.
_CHOOSE = frozenset(
    ("argmax", "argmin", "argsort", "kthvalue", "max", "median", "min", "mode", "msort", "nanmedian", "sort", "topk")
)
# Share of the largest value by which the others are moved to put equal ones in another order.
_TIP = 2.0**-20


class _TippedChoices(TorchFunctionMode):
    """Puts equal values in another order wherever a forward chooses among them.

    Args:
        seed: of the draw.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch, on moved values where it chooses."""
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], Tensor) and (name in _CHOOSE or name.endswith("_with_indices")):
            args = (self._tipped(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))

    def _tipped(self, x: Tensor) -> Tensor:
        if not x.is_floating_point() or not x.numel():
            return x
        reach = x.masked_fill(~x.isfinite(), 0.0).abs().max()
        amounts = torch.rand(x.shape, generator=self.generator).to(x.device, x.dtype) * 2 - 1
        return x + amounts * torch.where(reach > 0, reach, 1.0) * _TIP


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
def tipped_ties(
    prepared: Prepared, args: tuple[Any, ...], kwargs: dict[str, Any], simulated: Any
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return how far a simulated result is from itself with its ties tipped, once for each draw.

    Kernels multiply in orders of their own, and in a deep network each tie that this tips spreads; equal scores are
    sorted in orders of their own, too. One run is one draw of that noise; their spread says how far another engine may
    be.

    Returns:
        Signal-to-noise ratios in decibels, and shares of the values of integer outputs that differ.
    """
    draws, shares, expected = list[float](), list[float](), tensor_leaves(simulated)
    with torch.random.fork_rng(devices=[]), evaluation_mode(prepared.root):
        for draw in range(NUM_DRAWS):
            with prepared.attached("frozen"), prepared.simulation.jittering(draw), _TippedChoices(draw):
                tipped = tensor_leaves(prepared.root(*args, **kwargs))
            draws.append(signal_to_noise(*alike(expected, tipped)))
            shares.append(unequal_integers(expected, tipped) or 0.0)
    return tuple(draws), tuple(shares)


def farthest(draws: tuple[float, ...]) -> float:
    """Return the signal-to-noise ratio, in decibels, below which ties alone bring a model once in a thousand times.

    Noise powers add up over tipped ties, so mean and deviation are those of the powers; infinite without any noise.
    """
    power = most(tuple(10 ** (-decibels / 10) for decibels in draws if not math.isnan(decibels)))
    return -10 * math.log10(power) if power else math.inf


def most(draws: tuple[float, ...]) -> float:
    """Return what one more draw exceeds once in a thousand times; 0 without any."""
    return statistics.fmean(draws) + _DEVIATIONS * statistics.stdev(draws) if draws else 0.0
