"""Move the differences between channels of an activation into the weights that read it.

One scale per tensor wastes the grid on channels with small values. Dividing every channel by a factor and multiplying
the reader's weights by it keeps the function. Weights have a scale per output channel, so a depthwise convolution
takes any factor for nothing, and a dense layer shares the difficulty between activation and weight. Source: Xiao et
al. 2022, arXiv:2211.10438, equation 4: factor = max|x|**alpha / max|w|**(1 - alpha), there for Linear after LayerNorm.
"""

import torch
from torch import Tensor

from lightning_quant.calibrate.channels_read import activation_maxima
from lightning_quant.calibrate.groups import ScalingGroup
from lightning_quant.calibrate.rescale import folded_layer, rescale
from lightning_quant.calls.calls import Call
from lightning_quant.simulate.prepared import Prepared

# Factors stay within this ratio of the largest one: a channel that calibration never saw is not blown up without end.
_SMALLEST = 1e-3


@torch.no_grad()
def smooth(prepared: Prepared, groups: list[ScalingGroup], calls: list[Call], *, alpha: float = 0.5) -> int:
    """Rescale groups by the factors of equation 4; return how many.

    Ranges and bias corrections belong to the old grids afterwards: calibrate again.

    Args:
        prepared: detached and calibrated.
        groups: from `scaling_groups`.
        calls: of the module; they give the activations.
        alpha: how much of the difficulty moves into the weights, in [0, 1].
    """
    return smooth_by(prepared, activation_maxima(prepared, groups, calls), alpha)


@torch.no_grad()
def smooth_by(prepared: Prepared, maxima: dict[ScalingGroup, Tensor], alpha: float) -> int:
    """Rescale groups by the factors of equation 4 for known maxima of their activations; return how many.

    Where all readers are depthwise alpha is 1.

    Args:
        prepared: detached and calibrated.
        maxima: group to the largest magnitude of each channel, `(channels,)`.
        alpha: how much of the difficulty moves into the weights, in [0, 1].
    """
    for group, maximum in maxima.items():
        weights = [folded_layer(prepared, identity).weight for identity in group.consumers]
        free = all(weight.shape[1] == 1 for weight in weights) and group.channels > 1
        maximum = maximum.clamp(max=group.clip)
        factor = smoothing_factor(maximum, column_maximum(weights, group.channels), 1.0 if free else alpha)
        rescale(prepared, group, within_clip(factor, maximum, group.clip))
    return len(maxima)


def smoothing_factor(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Return the factor of each channel, `(channels,)`, the largest one being 1.

    Args:
        activation: `(channels,)`, largest magnitudes of the activation.
        weight: `(channels,)`, largest magnitudes of the weights that read each channel.
        alpha: how much of the difficulty moves into the weights, in [0, 1].
    """
    # A channel that is never active, or never read, decides nothing and asks for nothing.
    alive = (activation > 0) & (weight > 0)
    if not bool(alive.any()):
        return torch.ones_like(activation)
    tiny = torch.finfo(torch.float32).tiny
    logarithm = activation.clamp(min=tiny).log() * alpha - weight.clamp(min=tiny).log() * (1 - alpha)
    factor = (logarithm - logarithm[alive].max()).exp()
    return torch.where(alive, factor, torch.ones_like(factor)).clamp(_SMALLEST, 1)


def within_clip(factor: Tensor, maximum: Tensor, clip: float) -> Tensor:
    """Return factors that keep what was seen of each channel below the clip, `(channels,)`.

    The grid ends at the clip, so a channel's clip moves down with its factor: not below what was seen.
    """
    return factor if clip == float("inf") else torch.maximum(factor, maximum / clip).clamp(max=1)


def column_maximum(weights: list[Tensor], channels: int) -> Tensor:
    """Return the largest magnitude that reads each input channel, over all given weights, `(channels,)`."""
    maximum = torch.zeros(channels, dtype=torch.float32, device=weights[0].device)
    for weight in weights:
        flat = weight.abs().flatten(2).amax(2) if weight.dim() > 2 else weight.abs()
        by_channel = flat.view(channels // weight.shape[1], -1, weight.shape[1]).amax(1).flatten()
        maximum = torch.maximum(maximum, by_channel)
    return maximum
