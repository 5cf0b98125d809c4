"""Linear layers, and GPT-2's `Conv1D`, which is one with its weight transposed."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.layers import kernels  # noqa: F401
from lightning_quant.layers.layer import ADDED, StoredLayer
from lightning_quant.layers.storage import Scheme


class StoredLinear(StoredLayer):
    """A linear layer with a weight `(out_features, in_features)`, whatever the float layer's order."""

    @staticmethod
    def rows(float_layer: nn.Module, name: str) -> Tensor:
        """Return the weight with one row for each output feature."""
        weight = float_layer.get_parameter(name)
        # transformers.pytorch_utils.Conv1D
        return weight.t() if type(float_layer).__name__ == "Conv1D" else weight

    @classmethod
    def refusal(cls, float_layer: nn.Module, scheme: Scheme, group_size: int) -> str:
        """Return why a layer has no such form, or an empty text."""
        in_features = cls.rows(float_layer, "weight").shape[1]
        if scheme.storage == "int4" and (in_features % group_size or in_features % 2):
            return f"its {in_features} input features do not divide into groups of {group_size}"
        return ""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply as the scheme says."""
        bias: Tensor | None = self._parameters.get("bias")
        bias = self._buffers.get(ADDED) if bias is None else bias
        return linear(input, *self.stored("weight"), bias, self.scheme.arithmetic)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, arithmetic: str) -> Tensor:
    """Multiply by a stored weight.

    Args:
        x: `(..., in_features)`.
        weight: as stored, with a row for each output feature.
        scale: as stored.
        bias: `(out_features,)`, or None.
        arithmetic: as in `Scheme`.
    """
    if not x.is_floating_point():
        raise TypeError(f"a layer with stored weights got {x.dtype} where it reads floating point")
    if scale is None:
        dtype = weight.dtype if arithmetic == "half" else torch.float32
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)
    operator = "linear_dynamic" if arithmetic == "integer" else "linear_weight_only"
    return getattr(torch.ops.lightning_quant, operator)(x, weight, scale, bias)
