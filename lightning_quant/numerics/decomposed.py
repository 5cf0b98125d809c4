"""The operators of QDQ graphs, `torch.ops.quantized_decomposed.*`, which ONNX export, Inductor and ExecuTorch know.

PyTorch defines them in a part that is being removed (pytorch/ao#2259), and Inductor loads that part whenever it is
itself loaded: a second definition beside it would be an error. So they are defined here where PyTorch has none.
"""

import importlib.util
import sys

import torch
from torch import Tensor

from lightning_quant.numerics.fake_quantize import along

_OWNER = "torch.ao.quantization.fx._decomposed"
_SCHEMAS = {
    "quantize_per_tensor": (
        "(Tensor input, float scale, int zero_point, int quant_min, int quant_max, ScalarType dtype)"
    ),
    "dequantize_per_tensor": (
        "(Tensor input, float scale, int zero_point, int quant_min, int quant_max, ScalarType dtype, *, "
        "ScalarType? out_dtype=None)"
    ),
    "quantize_per_channel": (
        "(Tensor input, Tensor scales, Tensor zero_points, int axis, int quant_min, int quant_max, ScalarType dtype)"
    ),
    "dequantize_per_channel": (
        "(Tensor input, Tensor scales, Tensor? zero_points, int axis, int quant_min, int quant_max, ScalarType dtype, "
        "*, ScalarType? out_dtype=None)"
    ),
}
_LIBRARY: list[torch.library.Library] = []


def define_operators() -> None:
    """Make sure that the operators exist; PyTorch's own where it has them."""
    if hasattr(torch.ops.quantized_decomposed, "dequantize_per_channel"):
        return
    if _exists(_OWNER):
        importlib.import_module(_OWNER)
        return
    library = torch.library.Library("quantized_decomposed", "FRAGMENT")
    # It lives as long as the process, and with it the operators.
    _LIBRARY.append(library)
    for name, schema in _SCHEMAS.items():
        library.define(f"{name}{schema} -> Tensor")
        library.impl(name, globals()[name], "CompositeExplicitAutograd")
        # They compute on tensors without values as on others.
        torch.library.register_fake(f"quantized_decomposed::{name}", globals()[name], lib=library)


def quantize_per_tensor(
    input: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    """Return the integers of a tensor on one grid."""
    return torch.clamp(torch.round(input.float() * (1.0 / scale)) + zero_point, quant_min, quant_max).to(dtype)


def dequantize_per_tensor(
    input: Tensor,
    scale: float,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the values of integers on one grid."""
    return ((input.to(torch.float32) - zero_point) * scale).to(out_dtype or torch.float32)


def quantize_per_channel(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the integers of a tensor whose slices along an axis have a grid each."""
    scales, zero_points = along(scales, input, axis), along(zero_points, input, axis)
    return torch.clamp(torch.round(input.float() * (1.0 / scales)) + zero_points, quant_min, quant_max).to(dtype)


def dequantize_per_channel(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the values of integers whose slices along an axis have a grid each."""
    values = input if zero_points is None else input - along(zero_points, input, axis)
    return (values * along(scales, input, axis)).to(out_dtype or torch.float32)


def _exists(name: str) -> bool:
    """Tell whether a module can be imported, of packages that may be missing themselves."""
    parts = name.split(".")
    for number in range(1, len(parts) + 1):
        parent = ".".join(parts[:number])
        if parent in sys.modules and sys.modules[parent] is None:
            return False
        if importlib.util.find_spec(parent) is None:
            return False
    return True
