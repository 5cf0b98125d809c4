"""What integer kernels compute, to the last bit, in float tensors that hold whole numbers.

Simulating with float sums tips rounding ties at random, and in a deep network every tip spreads until simulation and
artifact are as far apart as either is from float. Source: the kernels of ONNX Runtime 1.31 on the CPU (QLinearConv,
QGemm, QLinearAdd in onnxruntime/core/mlas), against which they were compared value by value.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def requantize(sums: Tensor, step: Tensor, scale: Tensor, rounding: Callable[[Tensor], Tensor] = torch.round) -> Tensor:
    """Return integer sums in steps of an output, rounded to even by one float32 multiplication, not clipped.

    Args:
        sums: whole numbers below 2**24 in magnitude, which float32 holds exactly.
        step: value of one of them, broadcast along channels.
        scale: 0-dim, of the output.
        rounding: what takes the place of rounding to even; it may do so in place.
    """
    return rounding(sums * (step / scale))


def add(
    first: Tensor,
    second: Tensor,
    grids: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    output: tuple[Tensor, Tensor],
    rounding: Callable[[Tensor], Tensor] = torch.round,
) -> Tensor:
    """Return the sum of two quantized tensors in steps of an output, not clipped, without its zero point.

    Two fused multiply-adds in float32, first the second operand.

    Args:
        first: values on the first grid.
        second: values on the second grid.
        grids: scale and zero point of both.
        output: scale and zero point of the result.
        rounding: what takes the place of rounding to even.
    """
    (first_scale, first_zero), (second_scale, second_zero) = grids
    scale, zero = output
    first_ratio, second_ratio = first_scale / scale, second_scale / scale
    fixed = zero - (first_ratio * first_zero + second_ratio * second_zero)
    first_integers = (first.float() / first_scale).round_().add_(first_zero)
    second_integers = (second.float() / second_scale).round_().add_(second_zero)
    inner = _fused_multiply_add(second_integers, second_ratio, fixed)
    return rounding(_fused_multiply_add(first_integers, first_ratio, inner)) - zero


def _fused_multiply_add(x: Tensor, factor: Tensor, summand: Tensor) -> Tensor:
    # A float32 product is exact in float64, so there is one rounding, as in hardware.
    return x.double().mul_(factor.double()).add_(summand).float()
