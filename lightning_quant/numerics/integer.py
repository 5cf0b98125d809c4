"""What integer kernels compute, to the last bit, in float tensors that hold whole numbers.

Simulating with float sums tips rounding ties at random, and in a deep network every tip spreads until simulation and
artifact are as far apart as either is from float. Source: the kernels of ONNX Runtime 1.31 on the CPU (QLinearConv,
QGemm, QLinearAdd in onnxruntime/core/mlas), against which they were compared value by value.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Share of itself by which a value moves when float32 factors are multiplied in another order, a few roundings each.
_JITTER = 2.0**-20
# Below it a bias leaves sums of products their room in float32, whatever is added first.
_SMALL_BIAS = 2.0**22


def requantize(sums: Tensor, step: Tensor, scale: Tensor, rounding: Callable[[Tensor], Tensor] = torch.round) -> Tensor:
    """Return integer sums in steps of an output, rounded to even by one float32 multiplication, not clipped.

    Args:
        sums: whole numbers below 2**24 in magnitude, which float32 holds exactly.
        step: value of one of them, broadcast along channels.
        scale: 0-dim, of the output.
        rounding: what takes the place of rounding to even; it may do so in place.
    """
    return rounding(sums * (step / scale))


def summed_with(bias: Tensor) -> Tensor | None:
    """Return a bias in whole steps where a kernel may begin its sums with it; None where it is too large for that."""
    return bias if float(bias.abs().amax()) < _SMALL_BIAS else None


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
        first: integers on the first grid, without its zero point.
        second: integers on the second grid, likewise.
        grids: scale and zero point of both.
        output: scale and zero point of the result.
        rounding: what takes the place of rounding to even.
    """
    (first_scale, first_zero), (second_scale, second_zero) = grids
    scale, zero = output
    first_ratio, second_ratio = first_scale / scale, second_scale / scale
    fixed = zero - (first_ratio * first_zero + second_ratio * second_zero)
    inner = _fused_multiply_add(second, second_zero, second_ratio, fixed)
    return rounding(_fused_multiply_add(first, first_zero, first_ratio, inner)).sub_(zero)


def jittered(x: Tensor, generator: torch.Generator, together: int | None) -> Tensor:
    """Return values moved by as little as another order of the same float32 arithmetic would move them.

    Args:
        x: any shape.
        generator: draws by how much.
        together: which way all of them move, 0 for either; None where each moves on its own.
    """
    amounts = torch.rand(x.shape if together is None else (), generator=generator).to(x.device) * 2 - 1
    if together is not None:
        amounts = amounts.sign() if together == 0 else torch.full_like(amounts, together)
    return (x * (1 + amounts * _JITTER)).to(x.dtype)


def _fused_multiply_add(x: Tensor, zero_point: Tensor, factor: Tensor, summand: Tensor) -> Tensor:
    # A float32 product is exact in float64, so there is one rounding, as in hardware.
    x = x.expand(torch.broadcast_shapes(x.shape, summand.shape))
    return x.double().add_(zero_point).mul_(factor.double()).add_(summand).float()
