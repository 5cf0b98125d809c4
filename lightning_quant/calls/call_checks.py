"""Does a call of an artifact fit what was captured? Each of its tensors, the sizes that they share, its constants."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_quant.errors import QuantizationError

DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
"""What a signature may name of torch."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a signature: a dimension is a size, or a name when it may vary."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def difference(captured: list[Any], given: dict[str, Any]) -> str:
    """Return in words which constants of a call are not those that were captured."""
    if len(captured) != len(given):
        return f"{captured}, but got {given}"
    pairs = [(name, was, now) for was, (name, now) in zip(captured, given.items(), strict=True) if was != now]
    expected, got = (", ".join(f"{pair[0]}={pair[place]!r}" for pair in pairs) for place in (1, 2))
    return f"{expected}, but got {got}"


def as_captured(info: TensorInfo, tensor: Tensor) -> Tensor:
    """Return a tensor in the captured type, in which it must have the same values; floats may lose precision.

    Raises:
        QuantizationError: it is of another kind or shape, or its values would change.
    """
    kind = next((kind for kind in ("is_meta", "is_quantized", "is_nested", "is_sparse") if getattr(tensor, kind)), None)
    if kind is not None or tensor.layout is not torch.strided:
        layout = str(tensor.layout) if kind is None else kind.removeprefix("is_")
        raise QuantizationError(f"Expected `{info.name}` to be a dense tensor of {info.dtype}, but got a {layout} one.")
    _check_shape(info, tensor)
    dtype = DTYPES[info.dtype]
    if tensor.dtype is dtype:
        return tensor
    if tensor.is_complex() and not dtype.is_complex:
        raise QuantizationError(
            f"Expected `{info.name}` to be {info.dtype}, but got {_name(tensor.dtype)}: its imaginary part would be "
            "lost. Pass `torch.view_as_real(...)`, `.real` or `.abs()`, whatever the model was trained on."
        )
    converted = tensor.to(dtype)
    both_float = tensor.is_floating_point() and dtype.is_floating_point
    if not both_float and not torch.equal(converted.to(tensor.dtype), tensor):
        raise QuantizationError(
            f"Expected `{info.name}` to be {info.dtype}, but got {_name(tensor.dtype)} with values that {info.dtype} "
            "does not have. Convert it before the call."
        )
    return converted


def _check_shape(info: TensorInfo, tensor: Tensor) -> None:
    fits = len(info.shape) == tensor.dim() and all(
        isinstance(size, str) or size == actual for size, actual in zip(info.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise QuantizationError(f"Expected `{info.name}` to have shape {info.shape}, but got {tuple(tensor.shape)}.")


def check_named_sizes(inputs: tuple[TensorInfo, ...], tensors: list[Tensor]) -> None:
    """Make sure that dimensions of one name are of one size: runtimes would repeat one of them, or mix samples."""
    sizes: dict[str, tuple[int, str]] = {}
    for info, tensor in zip(inputs, tensors, strict=True):
        for label, actual in zip(info.shape, tensor.shape, strict=True):
            if not isinstance(label, str):
                continue
            expected, first = sizes.setdefault(label, (actual, info.name))
            if expected != actual:
                raise QuantizationError(
                    f"Expected `{first}` and `{info.name}` to have one size along {label!r}, as in the captured call, "
                    f"but got {expected} and {actual}. Repeat the shorter one with `expand`."
                )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
