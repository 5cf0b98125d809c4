"""Calls that are as captured and hold nothing nested: seen in a microsecond, where pytree and all checks take fifty."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_quant.calls.call_checks import DTYPES, TensorInfo
from lightning_quant.calls.result import freeze


class FlatParameter(NamedTuple):
    """A parameter that takes one tensor, or a constant.

    Attributes:
        name: of the parameter.
        by_keyword: whether it may be given by name.
        dtype: of the tensor that it takes; None where it takes a constant.
        shape: of that tensor.
        constant: the captured one, where it takes no tensor.
        has_default: whether a call may leave it out and passes what was captured.
    """

    name: str
    by_keyword: bool
    dtype: torch.dtype | None
    shape: tuple[int | str, ...]
    constant: Any
    has_default: bool


class FlatCall(NamedTuple):
    """The parameters of a signature without structures, those that may be given by position first.

    Attributes:
        parameters: in their order, `*args` and `**kwargs` left out.
        num_positional: how many may be given by position.
    """

    parameters: tuple[FlatParameter, ...]
    num_positional: int

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor] | None:
        """Return the tensors of a call in order; None where it is not as captured, or needs a closer look."""
        if len(args) > self.num_positional:
            return None
        tensors: list[Tensor] = []
        sizes: dict[str, int] = {}
        num_named = 0
        for index, (name, by_keyword, dtype, shape, constant, has_default) in enumerate(self.parameters):
            if index < len(args):
                value = args[index]
            elif by_keyword and name in kwargs:
                value = kwargs[name]
                num_named += 1
            elif has_default:
                continue
            else:
                return None
            if dtype is None:
                if not _is_same(value, constant):
                    return None
            elif isinstance(value, Tensor) and value.dtype is dtype and _fits(value, shape, sizes):
                tensors.append(value)
            else:
                return None
        return tensors if num_named == len(kwargs) else None


def flat_call(
    parameters: Sequence[tuple[str, str, Any]], inputs: Sequence[TensorInfo], constants: Sequence[Any]
) -> FlatCall | None:
    """Return how calls of a signature are bound; None where its arguments hold structures.

    Args:
        parameters: `(name, kind, default)` each.
        inputs: the tensors in order.
        constants: captured values of all other leaves.
    """
    infos = {info.name: info for info in inputs}
    own = [parameter for parameter in parameters if "VAR" not in parameter[1]]
    if [name for name, _, _ in own if name in infos] != list(infos) or len(own) != len(infos) + len(constants):
        return None
    left = iter(constants)
    made = []
    for name, kind, default in own:
        by_keyword = kind != "POSITIONAL_ONLY"
        if name in infos:
            made.append(FlatParameter(name, by_keyword, DTYPES[infos[name].dtype], infos[name].shape, None, False))
            continue
        constant = next(left)
        has_default = default != "required" and _is_same(freeze(default["value"]), constant)
        made.append(FlatParameter(name, by_keyword, None, (), constant, has_default))
    return FlatCall(tuple(made), sum(kind.startswith("POSITIONAL") for _, kind, _ in own))


def _fits(tensor: Tensor, shape: tuple[int | str, ...], sizes: dict[str, int]) -> bool:
    """Tell whether a tensor is dense and of a shape; `sizes` takes the sizes of named dimensions, one for each name."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested or tensor.dim() != len(shape):
        return False
    for size, actual in zip(shape, tensor.shape, strict=True):
        if size != actual and (isinstance(size, int) or sizes.setdefault(size, actual) != actual):
            return False
    return True


def _is_same(value: Any, captured: Any) -> bool:
    return value is captured or (type(value) is type(captured) and bool(value == captured))
