"""Triton kernels of fake quantization: each reads and writes a tensor once, in its own dtype and memory format.

Triton was chosen over functions under `torch.compile`: one kernel serves all sizes without compiling anew, a launch
costs the host less than a compiled function's guards, and division is that of IEEE 754, so that the integers are those
of the CPU. Nothing is read on the host. Triton comes with CUDA builds of torch; `kernels` imports this file where it is
there.

What a step costs is mostly the host's time for its many small launches (ResNet50 on an H100: two thirds of what
rounding added). So numbers of single edges are rows of tables that kernels read, not tensors that the host takes out,
and kernels are launched as compiled.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_quant.numerics.grid import Grid

_BLOCK = 2048
_PROGRAMS = 1024
# 1.5 * 2**23: a float32 has no digits after the point there, so adding it rounds half to even.
_ROUNDING: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit(
    do_not_specialize=["row", "seen_row"],
    do_not_specialize_on_alignment=["scales", "zero_points", "seen"],
)
def _rounding(
    x, y, mask, scales, zero_points, row, seen, seen_row, size,
    lowest_integer: tl.constexpr, highest_integer: tl.constexpr,
    relu: tl.constexpr, masks: tl.constexpr, observes: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    step = tl.load(scales + row)
    zero = tl.load(zero_points + row)
    highest = highest_integer - zero
    lowest = lowest_integer - zero
    upper = (highest + 0.5) * step
    lower = (lowest - 0.5) * step
    if relu:
        lowest = lowest * 0.0
        lower = lower * 0.0
    high = tl.full([block], float("-inf"), tl.float32)
    minus_low = tl.full([block], float("-inf"), tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * block, size, tl.num_programs(0) * block):
        place = start + tl.arange(0, block)
        inside = place < size
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if observes:
            result = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL) if relu else value
            # What is no number must not get lost in a comparison: it comes out as an infinite range.
            is_nan = result != result
            high = tl.maximum(high, tl.where(inside, tl.where(is_nan, float("inf"), result), float("-inf")))
            minus_low = tl.maximum(minus_low, tl.where(inside, tl.where(is_nan, float("inf"), -result), float("-inf")))
        integer = tl.clamp(tl.div_rn(value, step), lowest, highest, propagate_nan=tl.PropagateNan.ALL)
        integer = (integer + _ROUNDING) - _ROUNDING
        tl.store(y + place, (integer * step).to(y.dtype.element_ty, fp_downcast_rounding="rtne"), mask=inside)
        if masks:
            kept = ((value > lower) & (value < upper)).to(tl.int32)
            bits = tl.reshape(kept, (block // 8, 8)) << tl.arange(0, 8)[None, :]
            byte = start // 8 + tl.arange(0, block // 8)
            tl.store(mask + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte * 8 < size)
    if observes:
        tl.atomic_max(seen + 2 * seen_row, tl.max(minus_low, axis=0), sem="relaxed")
        tl.atomic_max(seen + 2 * seen_row + 1, tl.max(high, axis=0), sem="relaxed")


@triton.jit
def _passing(grad, mask, result, size, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < size
    byte = tl.load(mask + place // 8, mask=inside, other=0).to(tl.int32)
    kept = (byte >> (place % 8).to(tl.int32)) & 1
    value = tl.load(grad + place, mask=inside, other=0.0)
    tl.store(result + place, tl.where(kept != 0, value, 0.0), mask=inside)


@triton.jit(do_not_specialize=["seen_row"], do_not_specialize_on_alignment=["seen"])
def _observing(x, seen, seen_row, size, block: tl.constexpr):
    high = tl.full([block], float("-inf"), tl.float32)
    minus_low = tl.full([block], float("-inf"), tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * block, size, tl.num_programs(0) * block):
        place = start + tl.arange(0, block)
        inside = place < size
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        is_nan = value != value
        high = tl.maximum(high, tl.where(inside, tl.where(is_nan, float("inf"), value), float("-inf")))
        minus_low = tl.maximum(minus_low, tl.where(inside, tl.where(is_nan, float("inf"), -value), float("-inf")))
    tl.atomic_max(seen + 2 * seen_row, tl.max(minus_low, axis=0), sem="relaxed")
    tl.atomic_max(seen + 2 * seen_row + 1, tl.max(high, axis=0), sem="relaxed")


@triton.jit
def _maxima(first, places, lengths, maxima, block: tl.constexpr):
    row = tl.program_id(0)
    weight = first + tl.load(places + row)
    length = tl.load(lengths + row)
    largest = tl.zeros([block], tl.float32)
    for start in range(0, length, block):
        place = start + tl.arange(0, block)
        value = tl.abs(tl.load(weight + place, mask=place < length, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(value != value, float("inf"), value))
    tl.store(maxima + row, tl.max(largest, axis=0))


@triton.jit
def _rounding_rows(first, places, lengths, scales, rounded, rounded_places, block: tl.constexpr):
    row = tl.program_id(0)
    weight = first + tl.load(places + row)
    result = rounded + tl.load(rounded_places + row)
    length = tl.load(lengths + row)
    scale = tl.load(scales + row)
    for start in range(0, length, block):
        place = start + tl.arange(0, block)
        value = tl.load(weight + place, mask=place < length, other=0.0).to(tl.float32)
        integer = (tl.div_rn(value, scale) + _ROUNDING) - _ROUNDING
        tl.store(
            result + place,
            (integer * scale).to(rounded.dtype.element_ty, fp_downcast_rounding="rtne"),
            mask=place < length,
        )


def round_values(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    row: int,
    grid: Grid,
    *,
    relu: bool,
    masks: bool,
    seen: Tensor | None,
    seen_row: int,
) -> tuple[Tensor, Tensor]:
    """Return the rounded values and, when asked for, a bit for each of them: whether it lay on the grid.

    Args:
        x: dense.
        scales: `(edges,)` float32.
        zero_points: `(edges,)` float32.
        row: of the edge in both.
        grid: the integers.
        relu: whether to round what a ReLU makes of x.
        masks: whether to make the bits, `(values / 8,)` uint8.
        seen: `(rows, 2)` float32, minus the lowest and the highest value, which are raised to those of x.
        seen_row: where.
    """
    size = x.numel()
    y = torch.empty_like(x)
    mask = torch.empty((size + 7) // 8 if masks else 1, dtype=torch.uint8, device=x.device)
    observes = seen is not None
    integers = grid.low, grid.high, relu, masks, observes, _BLOCK
    programs = min(triton.cdiv(size, _BLOCK), _PROGRAMS)
    key = x.dtype, grid.low, grid.high, relu, masks, observes
    table = scales if seen is None else seen
    _launch(_rounding, programs, key, x, y, mask, scales, zero_points, row, table, seen_row, size, *integers)
    return y, mask


def pass_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    """Return a gradient where the mask of `round_values` has its bit, and zero elsewhere."""
    result = torch.empty_like(grad)
    size = grad.numel()
    _launch(_passing, triton.cdiv(size, _BLOCK), (grad.dtype,), grad, mask, result, size, _BLOCK)
    return result


def observe_values(x: Tensor, seen: Tensor, seen_row: int) -> None:
    """Raise a row of `seen`, minus the lowest and the highest value, to those of a dense tensor."""
    size = x.numel()
    programs = min(triton.cdiv(size, _BLOCK), _PROGRAMS)
    _launch(_observing, programs, (x.dtype,), x, seen, seen_row, size, _BLOCK)


_compiled: dict[Any, Any] = {}


def _launch(kernel: Any, programs: int, key: tuple[Any, ...], x: Tensor, *arguments: Any) -> None:
    """Launch a kernel over the values of a tensor, as compiled where it is by now.

    Triton asks of each launch again which of a kernel's versions serves its arguments (3.6.0, `JITFunction.run`), which
    costs the host more than the launch. `key` says what it would find, together with the device and with whether
    lengths and places are multiples of 16; what is rare in that goes Triton's way.
    """
    device, size = x.get_device(), x.numel()
    if not x.is_cuda:  # Triton's interpreter
        kernel[(programs,)](x, *arguments)
    elif device != torch.cuda.current_device():
        # Kernels run on the current device, which that of a module need not be.
        with torch.cuda.device(device):
            kernel[(programs,)](x, *arguments)
    elif x.data_ptr() % 16 or not 1 < size < 2**31:
        kernel[(programs,)](x, *arguments)
    elif (compiled := _compiled.get(key := (kernel, device, size % 16 == 0, *key))) is not None:
        compiled[(programs, 1, 1)](x, *arguments)
    else:
        _compiled[key] = kernel[(programs,)](x, *arguments)


class Rows:
    """The rows of several weights, one for each output channel, in one list for one launch.

    Args:
        weights: dense with the output channels outermost, of one dtype and on one device.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        device, self.first = weights[0].device, weights[0]
        places, lengths, rounded_places = [], [], []
        total = 0
        for weight in weights:
            length = weight.numel() // len(weight)
            # Where a weight lies is said from the first one on: pointers may be added to, but not made, everywhere.
            start = (weight.data_ptr() - self.first.data_ptr()) // weight.element_size()
            places += [start + row * length for row in range(len(weight))]
            rounded_places += [total + row * length for row in range(len(weight))]
            lengths += [length] * len(weight)
            total += weight.numel()
        self.places, self.rounded_places = (torch.tensor(v, device=device) for v in (places, rounded_places))
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.shapes = [(weight.shape, weight.stride(), weight.numel()) for weight in weights]
        self.total = total

    def maxima(self) -> Tensor:
        """Return the largest magnitude of each row, `(rows,)` float32."""
        maxima = torch.empty(len(self.lengths), dtype=torch.float32, device=self.first.device)
        _maxima[(len(self.lengths),)](self.first, self.places, self.lengths, maxima, 1024)
        return maxima

    def rounded(self, scales: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Return all weights rounded to multiples of their rows' scales, `(rows,)` float32, as parts of one tensor."""
        rounded = torch.empty(self.total, dtype=dtype, device=self.first.device)
        _rounding_rows[(len(self.lengths),)](
            self.first, self.places, self.lengths, scales, rounded, self.rounded_places, 1024
        )
        starts = [0]
        for _, _, size in self.shapes:
            starts.append(starts[-1] + size)
        return [
            rounded.as_strided(shape, stride, start)
            for (shape, stride, _), start in zip(self.shapes, starts[:-1], strict=True)
        ]
