"""Peers that train four bits in PyTorch: LSQ as it was published, and Brevitas; both round in float."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Step(torch.autograd.Function):
    """Equations 1 to 3 of Esser et al. 2020, arXiv:1902.08153."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        """Round to multiples of a step."""
        ctx.save_for_backward(x, step)
        ctx.ends = low, high
        return (x / step).round().clamp(low, high) * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Pass the gradient where nothing is clipped."""
        (x, step), (low, high) = ctx.saved_tensors, ctx.ends
        ratio = x / step
        inside = (ratio > low) & (ratio < high)
        slope = torch.where(inside, ratio.round() - ratio, ratio.clamp(low, high))
        return grad * inside, (grad * slope).sum(), None, None


class LsqLayer(nn.Module):
    """A layer with a learned step for its weight and one for what it reads; both are moved by the user's optimizer."""

    def __init__(self, layer: nn.Module, bits: int) -> None:
        super().__init__()
        self.layer = layer
        self.bits = bits
        self.weight_ends = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        weight: Any = layer.weight
        self.weight_step = nn.Parameter(_first_step(weight.detach(), self.weight_ends[1]))
        self.input_step = nn.Parameter(torch.ones(()))
        self.register_buffer("has_begun", torch.tensor(False))
        # Whether the first batch has values below zero.
        self.register_buffer("is_signed", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """Call the layer with rounded input and weight."""
        layer: Any = self.layer
        fresh = not self.has_begun
        if fresh:
            self.has_begun.fill_(True)
            self.is_signed.fill_(bool((x < 0).any()))
        input_ends = self.weight_ends if self.is_signed else (0, 2**self.bits - 1)
        if fresh:
            self.input_step.data.copy_(_first_step(x.detach(), input_ends[1]))
        x = _rounded(x, self.input_step, input_ends)
        weight = _rounded(layer.weight, self.weight_step, self.weight_ends)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return layer._conv_forward(x, weight, layer.bias)


def _first_step(x: Tensor, high: int) -> Tensor:
    return 2 * x.abs().mean() / high**0.5


def _rounded(x: Tensor, step: Tensor, ends: tuple[int, int]) -> Tensor:
    """Scale the gradient of the step as section 2.2 says."""
    scale = (x.numel() * ends[1]) ** -0.5
    return Step.apply(x, step * scale + (step - step * scale).detach(), *ends)


def with_lsq(net: nn.Module) -> None:
    """Put learned steps into a network: four bits, eight in the first and the last layer."""
    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for place, (name, layer) in enumerate(layers):
        is_end = place in (0, len(layers) - 1)
        parent, _, own = name.rpartition(".")
        setattr(net.get_submodule(parent), own, LsqLayer(layer, 8 if is_end else 4))


def with_brevitas(net: nn.Module) -> None:
    """Put layers of Brevitas into a network: scales per channel for weights, learned ones for what they read."""
    from brevitas import nn as quantized
    from brevitas import quant

    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for place, (name, layer) in enumerate(layers):
        bits = 8 if place in (0, len(layers) - 1) else 4
        read = quant.Int8ActPerTensorFloat if place == 0 else quant.Uint8ActPerTensorFloat
        options: dict[str, Any] = {"weight_quant": quant.Int8WeightPerChannelFloat, "weight_bit_width": bits}
        options |= {"input_quant": read, "input_bit_width": bits, "bias": layer.bias is not None}
        if isinstance(layer, nn.Linear):
            own = quantized.QuantLinear(layer.in_features, layer.out_features, **options)
        else:
            sizes = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
            own = quantized.QuantConv2d(*sizes, groups=layer.groups, **options)
        # The very parameters, which the optimizer knows.
        own.weight, own.bias = layer.weight, layer.bias
        own.weight_quant.init_tensor_quant()
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, own.train())
