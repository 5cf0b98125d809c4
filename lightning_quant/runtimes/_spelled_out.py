"""Operators that ONNX does not have, written in those it has, while a module is exported to it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Points up to which PyTorch computes distances one by one.
_FEW_POINTS = 25
# Rows of a matrix whose determinant is written out: each takes a dozen operators.
_MOST_ROWS = 64


class SpelledOut(TorchFunctionMode):
    """Writes products so far, determinants, inverses, distances, scattered values and averages in operators of ONNX."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = _WRITTEN.get(function)
        if written is None or (written in _OF_MATRICES and not _is_small(*args, **kwargs)):
            return function(*args, **kwargs)
        return written(*args, **kwargs)


class BinsSpelledOut(TorchFunctionMode):
    """Cuts the bins of adaptive pools out of sizes that may vary: exporters write those of the captured size."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _POOLED_DIMENSIONS:
            return _adaptive_pool(function, *args, **kwargs)
        return (_interpolate if function is F.interpolate else function)(*args, **kwargs)


class BagsSpelledOut(TorchFunctionMode):
    """Reduces bags of flat indices without the loop that PyTorch's exporter writes for them."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.embedding_bag and (reduced := _embedding_bag(*args, **kwargs)) is not None:
            return reduced
        return function(*args, **kwargs)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    *args: Any,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Reduce bags of flat indices as `F.embedding_bag` does; None for indices in two dimensions."""
    if args or offsets is None or input.dim() != 1 or kwargs.get("max_norm") is not None:
        return None
    starts = offsets[:-1] if include_last_offset else offsets
    begun = starts.new_zeros(input.shape[0] + 1).index_add(0, starts, torch.ones_like(starts))
    bag = begun.cumsum(0)[:-1] - 1
    rows = F.embedding(input, weight)
    counted = torch.ones_like(rows[:, 0])
    if padding_idx is not None:
        counted = (input != padding_idx % weight.shape[0]).to(rows.dtype)
    if mode == "max":
        lowest = torch.finfo(rows.dtype).min
        rows = torch.where(counted.unsqueeze(1) > 0, rows, lowest)
        most = rows.new_full((starts.shape[0], rows.shape[1]), lowest)
        most = most.scatter_reduce(0, bag.unsqueeze(1).expand_as(rows), rows, "amax")
        return torch.where(most == lowest, 0, most)
    factors = counted if per_sample_weights is None else counted * per_sample_weights
    total = rows.new_zeros(starts.shape[0], rows.shape[1]).index_add(0, bag, rows * factors.unsqueeze(1))
    if mode == "sum":
        return total
    return total / rows.new_zeros(starts.shape[0]).index_add(0, bag, counted).clamp(min=1).unsqueeze(1)


def _is_small(*args: Any, **kwargs: Any) -> bool:
    size = (args[0] if args else next(iter(kwargs.values()))).shape[-1]
    return isinstance(size, int) and size <= _MOST_ROWS


def _cumprod(input: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Multiply pairs, pairs of pairs and so on; where the length may vary, all that is not behind each value.

    Source: Hillis and Steele 1986, "Data parallel algorithms", for sums.
    """
    has_fractions = input.is_floating_point() or input.is_complex()
    x = input.to(dtype or (input.dtype if has_fractions else torch.int64)).movedim(dim, -1)
    length, step = x.shape[-1], 1
    if not isinstance(length, int):
        behind = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        return torch.where(behind, 1, x.unsqueeze(-2)).prod(-1).movedim(-1, dim)
    while step < length:
        x = torch.cat([x[..., :step], x[..., step:] * x[..., :-step]], -1)
        step *= 2
    return x.movedim(-1, dim)


def _scatter_reduce(
    input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """Divide scattered sums by scattered counts: PyTorch's exporter writes means as if only the last value counted."""
    if reduce != "mean":
        return input.scatter_reduce(dim, index, src, reduce, include_self=include_self)
    counts = torch.full_like(input, int(include_self)).scatter_add(dim, index, torch.ones_like(src))
    # Places that nothing is scattered to keep their values.
    kept = input if include_self else torch.where(counts > 0, 0, input)
    sums, counts = kept.scatter_add(dim, index, src), counts.clamp(min=1)
    return sums / counts if input.is_floating_point() else sums.div(counts, rounding_mode="floor")


def _scatter(input: Tensor, dim: int, index: Tensor, src: Any = None, **kwargs: Any) -> Tensor:
    reduce, value = kwargs.pop("reduce", None), kwargs.pop("value", src)
    if reduce is None:
        return input.scatter(dim, index, value)
    values = value if isinstance(value, Tensor) else torch.full_like(index, value, dtype=input.dtype)
    return input.scatter_reduce(dim, index, values, {"add": "sum", "multiply": "prod"}[reduce])


def _in_place(written: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda input, *args, **kwargs: input.copy_(written(input, *args, **kwargs))


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """Return distances; of many points by the product that PyTorch takes for them, too, in a fraction of the memory."""
    if p != 2 or max(x1.shape[-2], x2.shape[-2]) <= _FEW_POINTS:
        return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)
    squares = x1.square().sum(-1, keepdim=True) + x2.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * x1 @ x2.transpose(-1, -2)).clamp(min=0).sqrt()


def _pivots(a: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the pivots of Gaussian elimination with partial pivoting, and the sign of the permutation.

    Args:
        a: `(..., n, n)`.
    """
    pivots, sign = [], torch.ones_like(a[..., 0, 0])
    for rows in range(a.shape[-1], 0, -1):
        place = a[..., 0].abs().argmax(-1, keepdim=True)
        chosen = (torch.arange(rows, device=a.device) == place).unsqueeze(-1)
        row = torch.where(chosen, a, 0).sum(-2, keepdim=True)
        a = torch.where(chosen, a[..., :1, :], a)[..., 1:, :]
        pivot = row[..., 0, 0]
        pivots.append(pivot)
        sign = torch.where(place[..., 0] == 0, sign, -sign)
        # A column of zeros has nothing to eliminate.
        divisor = torch.where(pivot == 0, 1, pivot)[..., None, None]
        a = a[..., 1:] - a[..., :1] * (row[..., 1:] / divisor)
    return pivots, sign


def _slogdet(A: Tensor) -> Any:  # noqa: N803
    pivots, sign = _pivots(A)
    joined = torch.stack(pivots, -1)
    return torch.return_types.slogdet((sign * joined.sign().prod(-1), joined.abs().log().sum(-1)))


def _logdet(A: Tensor) -> Tensor:  # noqa: N803
    sign, logarithm = _slogdet(A)
    return torch.where(sign < 0, torch.nan, logarithm)


def _det(A: Tensor) -> Tensor:  # noqa: N803
    pivots, sign = _pivots(A)
    return sign * torch.stack(pivots, -1).prod(-1)


def _inv(A: Tensor) -> Tensor:  # noqa: N803
    """Eliminate with partial pivoting (Gauss and Jordan) in a matrix beside which the unit matrix stands."""
    rows = torch.arange(A.shape[-1], device=A.device).unsqueeze(-1)
    both = torch.cat([A, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)], -1)
    for i in range(A.shape[-1]):
        column = both[..., i : i + 1]
        place = torch.where(rows < i, -1, column.abs()).argmax(-2, keepdim=True)
        row = torch.where(rows == place, both, 0).sum(-2, keepdim=True)
        both = torch.where(rows == place, both[..., i : i + 1, :], both)
        row = row / row[..., i : i + 1]
        both = torch.where(rows == i, row, both - both[..., i : i + 1] * row)
    return both[..., A.shape[-1] :]


def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:  # noqa: N803
    inverse = _inv(A)
    if not left:
        return B @ inverse
    # As PyTorch tells a batch of vectors from matrices.
    is_vector = B.dim() == 1 or (B.dim() == A.dim() - 1 and B.shape == A.shape[:-1])
    return (inverse @ B.unsqueeze(-1)).squeeze(-1) if is_vector else inverse @ B


def _adaptive_pool(function: Callable[..., Any], input: Tensor, output_size: Any, *args: Any, **kwargs: Any) -> Any:
    """Pool the bins of each dimension in turn, where the size of one may vary.

    Bin `i` of `n` begins at `floor(i * length / n)` and ends before `ceil((i + 1) * length / n)`, as PyTorch has it.
    """
    dimensions = _POOLED_DIMENSIONS[function]
    sizes = output_size if isinstance(output_size, tuple | list) else (output_size,) * dimensions
    if all(n == 1 for n in sizes) or all(isinstance(length, int) for length in input.shape[-dimensions:]):
        return function(input, output_size, *args, **kwargs)
    bins = {axis: n for axis, n in zip(range(-dimensions, 0), sizes, strict=True) if n is not None}
    if function in _WITH_PLACES or any(args) or kwargs.get("return_indices"):
        raise ValueError("places of maxima in bins depend on a size that may vary")
    if not all(isinstance(n, int) for n in bins.values()):
        raise ValueError("the number of bins of a pool depends on a size that may vary")
    reduce = torch.mean if "avg" in function.__name__ else torch.amax
    for axis, n in bins.items():
        x = input.movedim(axis, -1)
        length = x.shape[-1]
        parts = [reduce(x[..., i * length // n : ((i + 1) * length + n - 1) // n], -1) for i in range(n)]
        input = torch.stack(parts, axis)
    return input


def _average_pool(
    function: Callable[..., Tensor],
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Count no padding where there is none: ONNX Runtime 1.31 divides last windows by all places with `ceil_mode`."""
    paddings = padding if isinstance(padding, tuple | list) else (padding,)
    counts = count_include_pad and not (ceil_mode and not any(paddings))
    return function(input, kernel_size, stride, padding, ceil_mode, counts, *args, **kwargs)


def _interpolate(input: Tensor, size: Any = None, scale_factor: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """Pool areas by bins, which `F.interpolate` does in the mode "area"."""
    mode = args[0] if args else kwargs.get("mode", "nearest")
    if mode != "area":
        return F.interpolate(input, size, scale_factor, *args, **kwargs)
    dimensions = input.dim() - 2
    if size is None:
        factors = scale_factor if isinstance(scale_factor, tuple | list) else (scale_factor,) * dimensions
        size = [int(n * f) if isinstance(n, int) else n for n, f in zip(input.shape[2:], factors, strict=True)]
    return _adaptive_pool(_AVERAGES[dimensions - 1], input, size)


_AVERAGES = F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d
_WITH_PLACES = (
    torch.adaptive_max_pool1d,
    F.adaptive_max_pool1d_with_indices,
    F.adaptive_max_pool2d_with_indices,
    F.adaptive_max_pool3d_with_indices,
)
_POOLED_DIMENSIONS: dict[Any, int] = {
    **{function: dimensions + 1 for dimensions, function in enumerate(_AVERAGES)},
    **dict.fromkeys((F.adaptive_max_pool1d, F.adaptive_max_pool1d_with_indices, torch.adaptive_max_pool1d), 1),
    **dict.fromkeys((F.adaptive_max_pool2d, F.adaptive_max_pool2d_with_indices), 2),
    **dict.fromkeys((F.adaptive_max_pool3d, F.adaptive_max_pool3d_with_indices), 3),
}
_OF_MATRICES = (_slogdet, _logdet, _det, _inv, _solve)
_WRITTEN: dict[Any, Any] = {
    **dict.fromkeys((torch.cumprod, Tensor.cumprod), _cumprod),
    **dict.fromkeys((torch.scatter_reduce, Tensor.scatter_reduce), _scatter_reduce),
    **dict.fromkeys((torch.scatter, Tensor.scatter), _scatter),
    Tensor.scatter_reduce_: _in_place(_scatter_reduce),
    Tensor.scatter_: _in_place(_scatter),
    torch.cdist: _cdist,
    **dict.fromkeys((torch.slogdet, Tensor.slogdet, torch.linalg.slogdet), _slogdet),
    **dict.fromkeys((torch.logdet, Tensor.logdet), _logdet),
    **dict.fromkeys((torch.inverse, Tensor.inverse, torch.linalg.inv), _inv),
    torch.linalg.solve: _solve,
    **dict.fromkeys((torch.det, Tensor.det, torch.linalg.det), _det),
    **{pool: functools.partial(_average_pool, pool) for pool in (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)},
}
