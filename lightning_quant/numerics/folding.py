"""Fold BatchNorm into the layer before it: the arithmetic that fake quantization and convert share.

Weights are rounded per output channel, and so is what folding multiplies: rounding commutes with the gain, so that in
training the unfolded weight is rounded and no gamma is divided by.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.numerics.adjustments import FoldedLayer
from lightning_quant.numerics.fake_quantize import BIAS_LIMIT, SMALLEST_SCALE, along, channel_maximum, weight_scale
from lightning_quant.surgery.routing import fetch, resolve


@dataclass(frozen=True)
class Norm:
    """Where the statistics of a BatchNorm that is folded are found in the graph's module.

    Attributes:
        owner: path of a module that has all of them, or has modules that have them.
        mean: name of the running mean, from the owner on.
        variance: name of the running variance.
        weight: name of gamma; empty when there is none.
        bias: name of beta; empty when there is none.
        eps: what is added to the variance.
    """

    owner: str
    mean: str
    variance: str
    weight: str
    bias: str
    eps: float


@dataclass(frozen=True)
class Affine:
    """A factor or shift behind a layer that is folded into it, of all channels or of each.

    Attributes:
        key: key of the node that carries it out.
        kind: "mul", "add", "sub" or "div".
        position: of the layer's result among the node's arguments.
        value: the number; None where it is computed from parameters.
        constant: key of the node that computes it from parameters; empty for a number.
    """

    key: str
    kind: str
    position: int
    value: float | None
    constant: str = ""

    def of(self, x: Tensor, value: Tensor | float) -> Tensor:
        """Return a tensor with a factor or shift put on it."""
        return _STEPS[self.kind](x, value)


_STEPS: dict[str, Any] = {"mul": operator.mul, "add": operator.add, "sub": operator.sub, "div": operator.truediv}


def with_affine(
    norm: "Statistics | None", steps: Sequence[tuple[Affine, Any]], channels: Tensor
) -> "Statistics | None":
    """Return the statistics of a BatchNorm that puts factors and shifts on its result, too.

    Args:
        norm: of the BatchNorm before them; None where they stand alone.
        steps: in order, each with its value: a number, or a tensor of one or one for each channel.
        channels: `(channels,)`, for their number, type and device.
    """
    if not steps:
        return norm
    gain, shift = torch.ones_like(channels), torch.zeros_like(channels)
    for step, given in steps:
        value = given.detach().to(channels).flatten() if isinstance(given, Tensor) else given
        shift = step.of(shift, value)
        gain = step.of(gain, value) if step.kind in ("mul", "div") else gain
    if norm is None:
        return Statistics(torch.zeros_like(gain), torch.ones_like(gain), gain, shift, 0.0)
    weight = gain if norm.weight is None else norm.weight * gain
    return replace(norm, weight=weight, bias=shift if norm.bias is None else norm.bias * gain + shift)


@dataclass(frozen=True)
class Statistics:
    """What a BatchNorm normalizes with, `(channels,)` each.

    Attributes:
        mean: running mean.
        variance: running variance.
        weight: gamma; None without.
        bias: beta; None without.
        eps: what is added to the variance.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Folded:
    """A layer's bias and scales with its BatchNorm folded in, `(out_channels,)` float32 each.

    Attributes:
        gain: factor on each channel of the weight; None without BatchNorm.
        bias: after folding, zeros when there is none.
        scale: of the folded weight.
        unfolded_scale: of the weight before folding; the same integers, and a scale that does not vanish with the gain.
        bias_step: value of one step of the int32 bias: input scale times weight scale.
    """

    gain: Tensor | None
    bias: Tensor
    scale: Tensor
    unfolded_scale: Tensor
    bias_step: Tensor

    @property
    def bias_integers(self) -> Tensor:
        """The bias in whole steps, `(out_channels,)`, in the int32 range."""
        return torch.round(self.bias / self.bias_step)

    def integers(self, weight: Tensor, quant_max: int) -> Tensor:
        """Return the folded weight in whole steps, float32, of the weight's shape."""
        weight = weight.detach().float()
        if self.gain is not None:
            weight = weight * along(self.gain, weight)
        return torch.round(weight / along(self.scale, weight)).clamp_(-quant_max, quant_max)


@torch.no_grad()
def fold(
    weight: Tensor,
    bias: Tensor | None,
    norm: Statistics | None,
    input_scale: Tensor,
    quant_max: int,
    step: Tensor | None = None,
) -> Folded:
    """Fold a BatchNorm (or None) into a layer and choose the weight scales.

    The gain is gamma / sqrt(var + eps), the bias (bias - mean) * gain + beta. Source: Jacob et al. 2018,
    arXiv:1712.05877, equation 14.

    Args:
        weight: `(out_channels, ...)`, before folding.
        bias: `(out_channels,)` or None.
        norm: what the BatchNorm normalizes with.
        input_scale: 0-dim, scale of the tensor that the layer reads.
        quant_max: 127 for 8-bit weights, 63 for 7-bit weights.
        step: `(out_channels,)`, learned scale of the unfolded weight, in place of that by the largest magnitudes.
    """
    gain, shift = merged(bias, norm)
    maximum = channel_maximum(weight) if step is None else step * quant_max
    unfolded = weight_scale(maximum, quant_max, gain=gain, bias=shift, input_scale=input_scale)
    scale = unfolded if gain is None else unfolded * gain.abs()
    shift = torch.zeros_like(scale) if shift is None else shift.float()
    # Where the gain is zero so is the scale; the bias still needs a step that int32 can count.
    scale = torch.maximum(scale, (shift.abs() / (input_scale * BIAS_LIMIT)).clamp(min=SMALLEST_SCALE))
    return Folded(gain, shift, scale, unfolded, scale * input_scale)


def statistics(module: nn.Module, norm: Norm | None) -> Statistics | None:
    """Return what the BatchNorm of these names normalizes with, in a module."""
    if norm is None:
        return None
    owner = resolve(module, norm.owner)
    weight, bias = (fetch(owner, name) if name else None for name in (norm.weight, norm.bias))
    return Statistics(fetch(owner, norm.mean), fetch(owner, norm.variance), weight, bias, norm.eps)


def fold_adjusted(layer: FoldedLayer, input_scale: Tensor, quant_max: int) -> Folded:
    """Return the scales of a layer that was folded before; one with a scale of its own keeps it."""
    if layer.scale is None:
        return fold(layer.weight, layer.bias, None, input_scale, quant_max)
    return Folded(None, layer.bias, layer.scale, layer.scale, layer.scale * input_scale)


def merged(bias: Tensor | None, norm: Statistics | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the factor on each output channel of a layer that has its BatchNorm folded in, and its bias then.

    Args:
        bias: of the layer; None without.
        norm: what the BatchNorm normalizes with; None without, which leaves no factor.
    """
    if norm is None:
        return None, bias
    gain, shift = gain_and_shift(norm.mean, norm.variance, norm.eps, norm.weight, bias)
    return gain, shift if norm.bias is None else shift + norm.bias.float()


def gain_and_shift(
    mean: Tensor, variance: Tensor, eps: float | Tensor, gamma: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the factor that folding a BatchNorm puts on each channel, and the bias before beta is added.

    Args:
        mean: running mean, one for each channel, as all others.
        variance: running variance.
        eps: what is added to the variance.
        gamma: weight of the BatchNorm.
        bias: of the layer.
    """
    gain = torch.rsqrt(variance.float() + eps)
    if gamma is not None:
        gain = gain * gamma.float()
    return gain, (-mean.float() if bias is None else bias.float() - mean.float()) * gain
