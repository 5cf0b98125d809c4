"""How weights are stored: int8 with a scale for each row, int4 with one for each group of a row, or half precision."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.arguments.keywords import known_arguments
from lightning_quant.layers.kernels import pack, unpack
from lightning_quant.numerics.fake_quantize import along

_HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Values that are rounded at a time: a large weight is never copied whole in float, and glibc, which adapts to the size
# of what is freed, still gives the memory of large tensors back to the system.
_BLOCK = 2**18


@known_arguments
@dataclass(frozen=True)
class Scheme:
    """How one layer is quantized.

    Attributes:
        name: as recipes call it.
        storage: "int8" (one scale for each row: output channel, token of an embedding, gate), "int4" (one scale for
            each group of a row), "float16" or "bfloat16".
        arithmetic: "integer" (activations get a range for each row when they arrive), "float", or "half".
        action: as plans call it.
    """

    name: str
    storage: str
    arithmetic: str
    action: str


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("dynamic", "int8", "integer", "int8 dynamic"),
        Scheme("weight_only", "int8", "float", "int8 weights"),
        Scheme("weight_only_4bit", "int4", "float", "int4 weights"),
        Scheme("float16", "float16", "half", "float16"),
        Scheme("bfloat16", "bfloat16", "half", "bfloat16"),
    )
}


@torch.no_grad()
def quantize(weight: Tensor, storage: str, group_size: int) -> tuple[Tensor, Tensor | None]:
    """Return a weight as it is stored, and its scale; None for half precision.

    Args:
        weight: `(rows, ...)`, floating point.
        storage: as in `Scheme`.
        group_size: values of a row that share a scale, for "int4"; a row must divide into groups.

    Returns:
        int8 of the weight's shape in [-127, 127] with a scale `(rows,)`; or two values in [-8, 7] in each byte,
        `(rows, columns / 2)`, with a scale `(rows, groups)`.

    Source of the 4-bit grid: llama.cpp, ggml, block_q4_0: the value of largest magnitude becomes -8 exactly.
    """
    if storage in _HALF:
        return weight.to(_HALF[storage]), None
    rows = max(1, _BLOCK // max(1, weight[0].numel()))
    is_int8 = storage == "int8"
    quantize_rows = _quantize_int8 if is_int8 else _quantize_int4
    integers = weight.new_empty(weight.shape if is_int8 else (len(weight), weight.shape[1] // 2), dtype=torch.int8)
    scale = weight.new_empty(len(weight), *(() if is_int8 else (weight.shape[1] // group_size,)), dtype=torch.float32)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        integers[part], scale[part] = quantize_rows(weight[part].float(), group_size)
    return integers, scale


def dequantize(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Return a stored weight in float32."""
    if scale is None:
        return stored.float()
    if scale.dim() == 2:
        return unpack(stored, scale)
    return stored.to(torch.float32) * along(scale, stored)


def _quantize_int8(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    scale = (weight.flatten(1).abs().amax(1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    integers = weight / along(scale, weight)
    return integers.round_().clamp_(-127, 127).to(torch.int8), scale


def _quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    groups = weight.unflatten(1, (-1, group_size))
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale = extreme / -8
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return pack((groups / scale).round_().clamp_(-8, 7).to(torch.int8).flatten(1)), scale.squeeze(2)
