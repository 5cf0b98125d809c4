"""Straight-through rounding: what integer arithmetic will do to a tensor, in float and with a gradient.

Source of the scheme: Jacob et al. 2018, arXiv:1712.05877, equations 1 and 12; rounding half to even and division by the
scale as in ONNX QuantizeLinear (opset 21). All arithmetic is float32 whatever the input's precision.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_quant.numerics import kernels
from lightning_quant.numerics.grid import Grid

# Room for the sum of products that int32 accumulators hold beside the bias.
BIAS_LIMIT = 2.0**30
# Scale of a channel whose weights are all zero: any positive value is right, the bias decides.
SMALLEST_SCALE = 1e-12
_LARGEST_STRETCH = 1e20
_NUM_CANDIDATES = 68


def affine_parameters(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of a grid over a range widened to hold zero.

    Args:
        low: lower end of the range, 0-dim, or one for each of several ranges.
        high: upper end of the range, likewise.
        grid: the integers.

    Returns:
        scale and zero_point, float32 in the shape of `low`; the zero point is a whole number of the grid, so 0.0 is
        exact. Where all that was seen is zero, the grid is that of [0, 1]: kernels cannot divide by a scale that is
        next to nothing.
    """
    low = low.float().clamp(max=0)
    high = high.float().clamp(min=0)
    width, steps = high - low, grid.high - grid.low
    if grid.symmetric:
        width, steps = torch.maximum(-low, high), grid.high - grid.middle
    # Accelerators multiply by the reciprocal of a number that the host holds, and the last bit would differ.
    scale = (torch.where(width > 0, width, 1.0) / torch.full_like(width, steps)).clamp(min=SMALLEST_SCALE)
    if grid.symmetric:
        return scale, torch.full_like(scale, grid.middle)
    zero_point = torch.round(-low / scale)
    # An operation more for each range would be the dearest of a training step.
    zero_point = zero_point + grid.low if grid.low else zero_point
    return scale, zero_point.clamp(grid.low, grid.high)


class _OnHost(torch.autograd.Function):
    """CPU kernel out of four in-place passes: 4.5 times the speed of torch's own (2.1 M values: 1.5 against 7 ms)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, lowest: float, highest: float, relu: bool) -> Tensor:
        ctx.save_for_backward(x)
        # The clip mask of rounding: a value is kept when its integer lies on the grid.
        ctx.bounds = (0.0 if relu else (lowest - 0.5) * scale, (highest + 0.5) * scale)
        y = x.float() / scale
        y = y.round_().clamp_(0.0 if relu else lowest, highest).mul_(scale)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, x, *ctx.bounds), None, None, None, None


class _OnDevice(torch.autograd.Function):
    """The same where the scale lies on a device: reading it on the host would stall an accelerator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, relu: bool) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.low, ctx.high, ctx.relu = low, high, relu
        lowest = torch.zeros_like(zero_point) if relu else low - zero_point
        y = x.float() / scale
        return y.round().clamp(lowest, high - zero_point).mul(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        lower = torch.zeros_like(scale) if ctx.relu else (ctx.low - zero_point - 0.5) * scale
        upper = (ctx.high - zero_point + 0.5) * scale
        inside = (x.float() > lower) & (x.float() < upper)
        return torch.where(inside, grad, 0), None, None, None, None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float,
    grid: Grid,
    *,
    relu: bool = False,
) -> Tensor:
    """Round to a grid and back; the gradient is 1 inside the range and 0 outside.

    Args:
        x: any shape and float dtype; the result has the same.
        scale: 0-dim float32, positive; or a number.
        zero_point: 0-dim float32 holding a whole number of the grid; or a number.
        grid: the integers.
        relu: whether to round what a ReLU makes of x, in the same passes.
    """
    if isinstance(scale, Tensor) and isinstance(zero_point, Tensor):
        if kernels.serve_values(x):
            return kernels.round_values(x, kernels.EdgeRows(scale, zero_point, 0, grid, relu))
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return _OnDevice.apply(x, scale, zero_point, grid.low, grid.high, relu)
        scale, zero_point = scale.item(), zero_point.item()
    return _OnHost.apply(x, scale, grid.low - zero_point, grid.high - zero_point, relu)


class _Given(torch.autograd.Function):
    """A weight that was rounded already; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: list[Tensor]) -> Tensor:
        ctx.dtype = weight.dtype
        return rounded.pop()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def pass_gradient(weight: Tensor, rounded: Tensor) -> Tensor:
    """Return the rounded weight with a gradient that passes to the weight unchanged."""
    # In a list: what is passed as a tensor costs more, and would have to be returned as a view.
    return _Given.apply(weight, [rounded])


class _PerChannel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return (weight.float() / scale).round_().mul_(scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype), None, None


def fake_quantize_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Round a weight to multiples of its channel's scale; the gradient passes unchanged.

    No value is clipped, because `weight_scale` never returns less than the largest magnitude asks for: the clip mask of
    the straight-through estimator is all ones and is left out.

    Args:
        weight: `(out_channels, ...)`, any float dtype.
        scale: `(out_channels,)`, float32, from `weight_scale`.
        dtype: of the result; the weight's by default.
    """
    return _PerChannel.apply(weight, along(scale, weight), weight.dtype if dtype is None else dtype)


def along(values: Tensor, like: Tensor, axis: int = 0) -> Tensor:
    """Shape one value for each slice along an axis, rows by default, so that they multiply a tensor.

    Args:
        values: `(like.shape[axis],)`.
        like: of any shape.
        axis: of `like`.
    """
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.view(shape)


def channel_maximum(weight: Tensor) -> Tensor:
    """Return the largest magnitude of each output channel, shape `(out_channels,)`, float32."""
    highest, lowest = channel_extremes(weight)
    return torch.maximum(highest, -lowest).float()


def channel_extremes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest and the lowest value of each output channel, `(out_channels,)`, in the weight's dtype."""
    inner = tuple(range(1, weight.dim()))
    return weight.detach().amax(inner), weight.detach().amin(inner)


def weight_scale(
    maximum: Tensor,
    quant_max: int | Tensor,
    *,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """Return the scale of each weight channel, large enough that the folded bias fits an int32.

    A bias is stored in steps of `input_scale * gain * scale`. Where the weights of a channel are (nearly) zero that
    step is so small that the bias would wrap around; the scale is stretched there until it fits.

    Args:
        maximum: `(out_channels,)`, largest magnitudes of the weights before folding.
        quant_max: 127 for 8-bit weights, 63 for 7-bit weights; a tensor holds one for each channel.
        gain: `(out_channels,)`, factor that folding a BatchNorm puts on each channel; may be zero or negative.
        bias: `(out_channels,)`, bias after folding.
        input_scale: scale of the input, 0-dim or one for each channel; without it nothing is stretched.

    Returns:
        `(out_channels,)`, float32, positive and finite, for the weights before folding.
    """
    # Divided by a tensor for the last bit, as in `affine_parameters`.
    divisor = quant_max if isinstance(quant_max, Tensor) else torch.full_like(maximum, quant_max)
    scale = (maximum / divisor).clamp(min=SMALLEST_SCALE)
    if bias is None or input_scale is None:
        return scale
    needed = bias.detach().float().abs() / (input_scale * BIAS_LIMIT)
    folded = scale if gain is None else gain.detach().float().abs() * scale
    # Not a division by gamma: the quotient only enters where it exceeds one, and is bounded.
    return scale * (needed / folded.clamp(min=1e-37)).clamp(1, _LARGEST_STRETCH)


@torch.no_grad()
def least_error_scale(weight: Tensor, scale: Tensor, quant_max: int) -> Tensor:
    """Return for each output channel the scale of least squared error, `(out_channels,)`, none above the given one.

    Source: Choukroun et al. 2019, arXiv:1902.06822, equation 2, by search.

    Args:
        weight: `(out_channels, ...)`, any float dtype.
        scale: `(out_channels,)`, by the largest magnitudes.
        quant_max: highest integer of the grid.
    """
    flat = weight.detach().float().flatten(1)
    best, least = scale.clone(), torch.full_like(scale, float("inf"))
    for share in torch.linspace(1, 0.05, _NUM_CANDIDATES):
        candidate = (scale * share).unsqueeze(1)
        rounded = torch.round(flat / candidate).clamp_(-quant_max, quant_max) * candidate
        error = (rounded - flat).square().sum(1)
        best = torch.where(error < least, candidate.squeeze(1), best)
        least = torch.minimum(error, least)
    return best
