"""Fake quantization in one kernel for each tensor, where Triton and a GPU are there; see `triton_kernels`."""

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_quant.grid import Grid

# Triton's interpreter runs the kernels on the CPU, slowly, for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def serve(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether there are kernels for tensors of a device and dtype; compilers make their own out of plain code."""
    if dtype not in _DTYPES or torch.compiler.is_compiling():
        return False
    return (device.type == "cuda" or (_INTERPRETED and device.type == "cpu")) and _has_triton()


def serve_values(x: Tensor) -> bool:
    """Tell whether there are kernels for a tensor."""
    return serve(x.device, x.dtype) and x.numel() > 0


class _Passed(torch.autograd.Function):
    """A gradient where a mask lets it through; its own gradient passes likewise."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, mask: Tensor, strides: tuple[int, ...]) -> Tensor:
        from lightning_quant import triton_kernels

        ctx.save_for_backward(mask)
        ctx.strides = strides
        if grad.stride() != strides:
            # The bits are in the order in which the values lie in memory.
            grad = torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device).copy_(grad)
        return triton_kernels.pass_gradient(grad, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return _Passed.apply(grad, mask, ctx.strides), None, None


class _Rounded(torch.autograd.Function):
    """Keeps one bit of each value for the gradient, not the values: 1/16 of their memory in half precision."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        grid: Grid,
        relu: bool,
        extremes: Tensor | None,
        masks: bool,
    ) -> Tensor:
        from lightning_quant import triton_kernels

        y, mask = triton_kernels.round_values(x, scale, zero_point, grid, relu=relu, masks=masks, extremes=extremes)
        if masks:
            ctx.save_for_backward(mask)
            ctx.strides = x.stride()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return _Passed.apply(grad, mask, ctx.strides), None, None, None, None, None, None


def round_values(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, *, relu: bool, extremes: Tensor | None = None
) -> Tensor:
    """Round as `fake_quantize` does.

    Args:
        x: that `serve_values` is true of.
        scale: 0-dim float32.
        zero_point: 0-dim float32.
        grid: the integers.
        relu: whether to round what a ReLU makes of x.
        extremes: `(2,)` float32, minus the lowest and the highest value, which is raised to those of what is rounded.
    """
    masks = torch.is_grad_enabled() and x.requires_grad
    return _Rounded.apply(_dense(x), scale, zero_point, grid, relu, extremes, masks)


def observe_values(x: Tensor, extremes: Tensor) -> None:
    """Raise `extremes`, minus the lowest and the highest value, to those of a tensor that `serve_values` is true of."""
    from lightning_quant import triton_kernels

    triton_kernels.observe_values(_dense(x.detach()), extremes)


def are_rows(weights: Sequence[Tensor]) -> bool:
    """Tell whether `rows_of` takes these weights."""
    first = weights[0]
    return all(
        w.dtype == first.dtype and w.device == first.device and serve_values(w) and _is_dense(w) for w in weights
    )


def rows_of(weights: Sequence[Tensor]) -> Any:
    """Return the `triton_kernels.Rows` of weights that `are_rows` is true of."""
    from lightning_quant import triton_kernels

    return triton_kernels.Rows([weight.detach() for weight in weights])


def _dense(x: Tensor) -> Tensor:
    return x if _is_dense(x) else x.contiguous()


def _is_dense(x: Tensor) -> bool:
    """Tell whether values lie side by side, the first dimension outermost."""
    if x.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])
