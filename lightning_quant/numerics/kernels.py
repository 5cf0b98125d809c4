"""Fake quantization in one kernel for each tensor, where Triton and a GPU are there; see `triton_kernels`."""

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_quant.numerics.grid import Grid

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
        ctx.save_for_backward(mask)
        ctx.strides = strides
        return _passed(grad, mask, strides)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return _Passed.apply(grad, mask, ctx.strides), None, None


def _passed(grad: Tensor, mask: Tensor, strides: tuple[int, ...]) -> Tensor:
    from lightning_quant.numerics import triton_kernels

    if grad.stride() != strides:
        # The bits are in the order in which the values lie in memory.
        grad = torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device).copy_(grad)
    return triton_kernels.pass_gradient(grad, mask)


class EdgeRows(NamedTuple):
    """What kernels read and write of one edge, in tables on the device.

    Attributes:
        scales: `(edges,)` float32.
        zero_points: `(edges,)` float32.
        row: of the edge in both.
        grid: the integers.
        relu: whether to round what a ReLU makes of the values.
        seen: `(rows, 2)` float32, minus the lowest and the highest value, which are raised to those of what is rounded.
        seen_row: of the edge in that.
    """

    scales: Tensor
    zero_points: Tensor
    row: int
    grid: Grid
    relu: bool
    seen: Tensor | None = None
    seen_row: int = 0


class _Rounded(torch.autograd.Function):
    """Keeps one bit of each value for the gradient, not the values: 1/16 of their memory in half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: EdgeRows, masks: bool) -> Tensor:
        from lightning_quant.numerics import triton_kernels

        scales, zero_points, row, grid, relu, seen, seen_row = rows
        y, mask = triton_kernels.round_values(
            x, scales, zero_points, row, grid, relu=relu, masks=masks, seen=seen, seen_row=seen_row
        )
        if masks:
            ctx.save_for_backward(mask)
            ctx.strides = x.stride()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        # A function costs the host as much as its kernel: only gradients of gradients need it.
        passed = _Passed.apply if torch.is_grad_enabled() else _passed
        return passed(grad, mask, ctx.strides), None, None


def round_values(x: Tensor, rows: EdgeRows) -> Tensor:
    """Round a tensor that `serve_values` is true of, as `fake_quantize` does."""
    return _Rounded.apply(_dense(x), rows, torch.is_grad_enabled() and x.requires_grad)


def observe_values(x: Tensor, seen: Tensor, seen_row: int) -> None:
    """Raise a row of `seen`, minus the lowest and the highest value, to those of a tensor.

    Args:
        x: that `serve_values` is true of.
        seen: `(rows, 2)` float32.
        seen_row: which of them.
    """
    from lightning_quant.numerics import triton_kernels

    triton_kernels.observe_values(_dense(x.detach()), seen, seen_row)


def are_rows(weights: Sequence[Tensor]) -> bool:
    """Tell whether `rows_of` takes these weights."""
    first = weights[0]
    return all(
        w.dtype == first.dtype and w.device == first.device and serve_values(w) and _is_dense(w) for w in weights
    )


def rows_of(weights: Sequence[Tensor]) -> Any:
    """Return the `triton_kernels.Rows` of weights that `are_rows` is true of."""
    from lightning_quant.numerics import triton_kernels

    return triton_kernels.Rows([weight.detach() for weight in weights])


def _dense(x: Tensor) -> Tensor:
    return x if _is_dense(x) else x.contiguous()


def _is_dense(x: Tensor) -> bool:
    """Tell whether values lie side by side, the first dimension outermost."""
    if x.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])
