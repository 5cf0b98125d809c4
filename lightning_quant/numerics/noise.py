"""How far two results are apart."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Values compared at a time.
_PART = 1 << 20


def signal_to_noise(reference: Any, other: Any) -> float:
    """Return 10 log10 of signal over noise power in decibels, over all float tensors of two equal structures.

    Infinite when they are equal. Where both hold the same infinity or NaN, as masks do, values do not count; NaN or
    minus infinity when only one does. NaN for tensors of unequal sizes, see `alike`.
    """
    signal = noise = 0.0
    for expected, actual in zip(pytree.tree_leaves(reference), pytree.tree_leaves(other), strict=True):
        if isinstance(expected, Tensor) and expected.is_floating_point():
            if expected.shape != actual.shape:
                return float("nan")
            # Part by part: a whole embedding in double precision would be a multiple of the model.
            parts = (tensor.detach().reshape(-1).split(_PART) for tensor in (expected, actual))
            for a, b in zip(*parts, strict=True):
                power, error = _powers(a, b)
                signal += power.sum().item()
                noise += error.sum().item()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))


def sample_ratios(reference: list[Tensor], other: list[Tensor]) -> list[float]:
    """Return `signal_to_noise` of each sample, where all tensors have as many in dimension 0; else of all in one.

    Args:
        reference: exact values.
        other: of the same sizes, see `alike`.
    """
    pairs = [(a, b) for a, b in zip(reference, other, strict=True) if a.is_floating_point()]
    sizes = {len(a) if a.dim() else 0 for a, _ in pairs}
    if len(sizes) != 1 or min(sizes) < 2 or not all(a.numel() for a, _ in pairs):
        return [signal_to_noise(reference, other)]
    signal, noise = torch.zeros(2, sizes.pop(), dtype=torch.float64)
    for pair in pairs:
        rows = [tensor.detach().reshape(len(tensor), -1) for tensor in pair]
        number = max(1, _PART // rows[0].shape[1])
        parts = (tensor.split(number) for tensor in rows)
        powers = [_powers(a, b) for a, b in zip(*parts, strict=True)]
        signal += torch.cat([power.sum(1) for power, _ in powers])
        noise += torch.cat([error.sum(1) for _, error in powers])
    ratios = torch.where(noise == 0, float("inf"), 10 * torch.log10(signal / noise))
    return [float(ratio) for ratio in ratios]


def _powers(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squares of the first and of the difference; zeros where both hold the same infinity or NaN."""
    a, b = a.cpu().double(), b.cpu().double()
    masked = ~a.isfinite() & ((a == b) | (a.isnan() & b.isnan()))
    a, b = a.masked_fill(masked, 0.0), b.masked_fill(masked, 0.0)
    return a.square(), (a - b).square()


def unequal_integers(reference: Any, other: Any) -> float | None:
    """Return the share of values that differ over all tensors that are no floats: classes, indices, masks.

    None where there are none. Tensors of unequal sizes do not count, as in `alike`.
    """
    pairs = [(a, b) for a, b in zip(*alike(reference, other), strict=True) if a.numel()]
    pairs = [(a, b) for a, b in pairs if not (a.is_floating_point() or a.is_complex())]
    if not pairs:
        return None
    return sum((a.cpu() != b.cpu()).sum().item() for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def alike(reference: Any, other: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of two equal structures that are of one size in both.

    Those whose size depends on values, as of what a mask leaves, are not where rounding moved a value over a bound.
    """
    pairs = zip(pytree.tree_leaves(reference), pytree.tree_leaves(other), strict=True)
    kept = [(a, b) for a, b in pairs if isinstance(a, Tensor) and a.shape == b.shape]
    return [a for a, _ in kept], [b for _, b in kept]


def equal_argmax(simulated: list[Any], exported: list[Any]) -> float | None:
    """Return the share of equal predictions where the result is class scores `(batch, classes)`, else None."""
    if (
        len(simulated) != 1
        or simulated[0].shape != exported[0].shape
        or simulated[0].dim() != 2
        or simulated[0].shape[1] < 2
        or not simulated[0].is_floating_point()
    ):
        return None
    return (simulated[0].argmax(1) == exported[0].argmax(1)).float().mean().item()
