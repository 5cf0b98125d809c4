"""What code of a forward does that no exporter follows, and that a program can do without."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def allowances() -> Iterator[None]:
    """Let an exporter follow the code of a forward that it would refuse for what changes no result."""
    with _masks_as_given(), _distributions_unchecked(), _Copies(), _Respelled():
        yield


class _Array:
    """Stands for the values of a tensor that a forward keeps for itself as a NumPy array, to look at later."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"`.{name}` of a NumPy array is needed, whose values an exporter does not have")


@contextlib.contextmanager
def _masks_as_given() -> Iterator[None]:
    """Let PyTorch's transformers apply masks without looking into them first, for values that no exporter has.

    They ask whether a mask is the causal one, which faster kernels know without it.
    """
    from torch.nn.modules import transformer

    def said(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        return bool(is_causal)

    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = said
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = before


@contextlib.contextmanager
def _distributions_unchecked() -> Iterator[None]:
    """Let PyTorch's distributions take parameters without looking whether they are valid, in values."""
    from torch.distributions import Distribution

    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


class _Copies(TorchFunctionMode):
    """Clones where code copies a tensor with `copy.deepcopy`, as metrics do that a forward makes; keeps arrays empty.

    An array that code computes with, or asks for anything, is refused there.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.clone())
        if function is Tensor.numpy and type(args[0]) not in (Tensor, nn.Parameter):
            return _Array()
        return function(*args, **(kwargs or {}))


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class _Respelled(TorchFunctionMode):
    """Writes what exporters know in one form alone, or not at all, in operators that all of them know."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention and args and args[0].dim() == 3:
            return _attention_of_one_head(*args, **(kwargs or {}))
        if function is torch.linspace:
            return _linspace(*args, **(kwargs or {}))
        if function == _DATA:
            # PyTorch's exporters take it for a constant without values, and end the process where they look into it.
            return args[0].detach()
        return function(*args, **(kwargs or {}))


def _linspace(start: Any, end: Any, steps: Any, **kwargs: Any) -> Tensor:
    """Count the steps where their number may vary, of which PyTorch's exporters make a constant."""
    if isinstance(steps, int) or not all(isinstance(limit, int | float) for limit in (start, end)):
        return torch.linspace(start, end, steps, **kwargs)
    kwargs["dtype"] = kwargs.get("dtype") or torch.get_default_dtype()
    return start + torch.arange(steps, **kwargs) * ((end - start) / torch.sym_max(steps - 1, 1))


def _attention_of_one_head(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Attend, with queries `(N, L, E)`, as one head `(N, 1, L, E)`, which is what ONNX has."""
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unsqueeze(1)
    q, k, v = (x.unsqueeze(1) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask, *args, **kwargs).squeeze(1)


class BilinearAsProducts(TorchFunctionMode):
    """Writes `F.bilinear` as a product with a matrix and a sum; PyTorch's operator is none of its core ones."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_bilinear if function is F.bilinear else function)(*args, **(kwargs or {}))


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `sum_ij input1_i weight_oij input2_j + bias_o`, weight `(out, in1, in2)`."""
    outputs, _, second = weight.shape
    product = (input1 @ weight.permute(1, 0, 2).flatten(1)).unflatten(-1, (outputs, second))
    result = (product * input2.unsqueeze(-2)).sum(-1)
    return result if bias is None else result + bias
