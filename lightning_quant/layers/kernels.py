"""The arithmetic of quantized layers as operators of PyTorch, `torch.ops.lightning_quant.*`, on plain tensors.

As operators they stay whole in exported programs, and a runtime can put its own nodes in their place. They are for
inference: no gradient passes through them. What was found
on a Xeon with VNNI and AMX, one thread, 192 rows (milliseconds; 768 to 3072 and 768 to 50257 features):

* float32 5.9 and 116; `onednn.qlinear_pointwise` on packed int8 weights 0.5 and 28; `torch._int_mm`, which packs at
  each call, 1.6 and 99; torch.ao's dynamic linear, one activation scale for the tensor, 1.8 and 67;
  `_weight_int8pack_mm` in float32 250 and 4,358, in bfloat16 12 and 258.
* onednn takes one activation scale. Rows scaled beforehand, with 1.0 for that scale, give one for each row at no cost
  in the matrix product.
* It packs weights for uint8 rows with a zero point. For int8 rows, or the zero point 0, there is no kernel without AMX,
  and its reference takes over: on an AMD EPYC with AVX-512 VNNI 192 rows of 768 by 768 took 4,400, rows of uint8 with
  the zero point 128 take 0.6 (float32 2.4). Without VNNI two products are added in 16 bits, as they are in
  `torch._int_mm`, and saturate for integers as large as these (see `_is_exact`).
* Weight-only: turning the whole weight into float first costs 200 for the wide layer, turning 2**18 values at a time,
  which stay in the cache, 126 to 135; with one row of 1,024 features, 13.6 against 92.6 (float32: 14.1).
"""

import functools

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Weights that are turned into float at a time: a megabyte, which stays in a core's cache.
_BLOCK = 2**18
_LIBRARY = torch.library.Library("lightning_quant", "DEF")
_LIBRARY.define("linear_dynamic(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")
_LIBRARY.define("linear_weight_only(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")
# Packed weights of onednn by the tensor that they were made of, with its version and the sums of its rows.
_PACKED = WeakIdKeyDictionary()


@torch.no_grad()
def linear_dynamic(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply rows of eight bits, each with a range of its own, by an int8 weight.

    A row is x = step * q + offset with q in [-127, 127], so that x @ w = step * scale * (q @ weight) + offset * sum(w).
    The offset is a whole number of steps, which puts zero on the grid: rows have many values at or near it. (A language
    model of 135 million parameters: perplexity 58.5; 59.1 with the offset in the middle of the row; float 57.0.)

    Args:
        x: `(..., in_features)`, floating point.
        weight: `(out_features, in_features)`, int8 in [-127, 127].
        scale: `(out_features,)`, float32.
        bias: `(out_features,)`, or None.

    Source: rows as in LLM.int8() (Dettmers et al. 2022, section 2.1, vector-wise), with the asymmetric ranges of
        Jacob et al. 2018, equation 7.
    """
    _check_sizes(x, weight, scale, bias, per_byte=1)
    rows = x.reshape(-1, x.shape[-1]).float()
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    high, low = rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True)
    # Scaled before they are added: the range of a row may be wider than float32.
    step = (high * (1 / 254) - low * (1 / 254)).clamp_(min=torch.finfo(torch.float32).tiny)
    offset = _whole_steps(high * 0.5 + low * 0.5, step)
    integers = (rows - offset).mul_(step.reciprocal()).round_().clamp_(-127, 127).to(torch.int8)
    product, weight_sums = _integer_product(integers, weight, scale)
    product.mul_(step).addr_(offset.flatten(), weight_sums)
    if bias is not None:
        product.add_(bias)
    return product.to(x.dtype).reshape(*x.shape[:-1], -1)


def _whole_steps(x: Tensor, step: Tensor) -> Tensor:
    """Return the nearest multiple of the step; `x` itself where the step is too small to count in, in constant rows."""
    number = (x / step).round_()
    return torch.where(number.isfinite(), number * step, x)


@torch.no_grad()
def linear_weight_only(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply in floating point by a weight that is turned into float a block of rows at a time.

    Args:
        x: `(..., in_features)`, floating point.
        weight: `(out_features, in_features)`, int8; or two values of four bits in each, `(out_features,
            in_features / 2)`.
        scale: `(out_features,)`; for four bits `(out_features, groups)`.
        bias: `(out_features,)`, or None.
    """
    _check_sizes(x, weight, scale, bias, per_byte=scale.dim())
    result = x.new_empty(*x.shape[:-1], weight.shape[0])
    block = max(1, _BLOCK // x.shape[-1])
    for start in range(0, weight.shape[0], block):
        part = slice(start, start + block)
        if scale.dim() == 1:
            product = F.linear(x, weight[part].to(x.dtype))
            torch.mul(product, scale[part].to(x.dtype), out=result[..., part])
        else:
            result[..., part] = F.linear(x, unpack(weight[part], scale[part]).to(x.dtype))
    return result if bias is None else result.add_(bias)


def pack(integers: Tensor) -> Tensor:
    """Put two values of four bits, plus eight, into each byte, the first in the low half, as MatMulNBits has them.

    Args:
        integers: `(out_features, in_features)`, int8 in [-8, 7], with an even number of input features.
    """
    low, high = (integers + 8).view(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return ((high << 4) | low).view(torch.int8)


def unpack(packed: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weight `(out_features, in_features)` of packed values and scales `(out_features, groups)`."""
    integers = torch.stack([packed & 15, (packed >> 4) & 15], dim=-1).flatten(1) - 8
    return (integers.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)


def _check_sizes(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *, per_byte: int) -> None:
    """Make sure that tensors fit each other: they may come from a file, and kernels read as far as the others reach."""
    rows = weight.shape[:1]
    fits = (
        weight.dim() == 2 and x.dim() > 0 and weight.shape[1] * per_byte == x.shape[-1] and weight.dtype is torch.int8
    )
    if not fits or scale.shape[:1] != rows or scale.dim() not in (1, 2) or (bias is not None and bias.shape != rows):
        raise ValueError(
            f"weight {tuple(weight.shape)}, scale {tuple(scale.shape)} and rows {tuple(x.shape)} do not fit"
        )


def _integer_product(rows: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return `rows @ weight.T * scale` in float32, and the sums of the dequantized weight's rows."""
    if not (rows.is_cpu and torch.backends.mkldnn.is_available() and _is_exact()):
        return F.linear(rows.float(), weight.float()) * scale, weight.sum(1, dtype=torch.int32) * scale
    version = 0 if weight.is_inference() else weight._version
    packed = _PACKED.get(weight)
    if packed is None or packed[0] != version:
        packed = _PACKED[weight] = (version, _prepacked(weight), weight.sum(1, dtype=torch.int32))
    _, prepacked, sums = packed
    return _packed_product(rows, prepacked, scale), sums * scale


def _prepacked(weight: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)


def _packed_product(rows: Tensor, prepacked: Tensor, scale: Tensor) -> Tensor:
    """Return the product of int8 rows with a packed weight, in float32."""
    zero_points = torch.zeros(scale.shape[0], dtype=torch.int32)
    # The upper bit turned over: 128 more, in uint8.
    shifted = rows.view(torch.uint8) ^ 128
    return torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, prepacked, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def _is_exact() -> bool:
    """Return whether the integer kernels of this processor add up the largest products without saturating."""
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    product = _packed_product(weight, _prepacked(weight), torch.ones(16))
    return bool((product == 64 * 127**2).all())


def _shape(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_LIBRARY.impl("linear_dynamic", linear_dynamic, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_weight_only", linear_weight_only, "CompositeExplicitAutograd")
torch.library.register_fake("lightning_quant::linear_dynamic", _shape, lib=_LIBRARY)
torch.library.register_fake("lightning_quant::linear_weight_only", _shape, lib=_LIBRARY)
