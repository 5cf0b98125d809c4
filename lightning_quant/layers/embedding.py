"""Embeddings: a row of int8 and its scale for each token."""

from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.layers.layer import StoredLayer
from lightning_quant.layers.storage import Scheme, dequantize


class StoredEmbedding(StoredLayer):
    """A table of which only the rows that are asked for become float.

    Attributes:
        factor: what rows are multiplied by, 0-dim, where the float layer is a scaled one.
    """

    def __init__(self, float_layer: nn.Module, scheme: Scheme, stored: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        super().__init__(float_layer, scheme, stored)
        if type(float_layer).forward is not nn.Embedding.forward:
            self.register_buffer("factor", row_factor(float_layer))

    @classmethod
    def refusal(cls, float_layer: nn.Module, scheme: Scheme, group_size: int) -> str:
        """Return why a layer has no such form, or an empty text."""
        if float_layer.max_norm is not None:
            return "`max_norm` changes its weights at each call"
        if scheme.arithmetic == "integer":
            return "a table is only read"
        return "embeddings are stored with eight bits for each value" if scheme.storage == "int4" else ""

    def forward(self, input: Tensor) -> Tensor:
        """Return `(..., embedding_dim)` for indices of any shape."""
        weight, scale = self.stored("weight")
        rows = F.embedding(input, weight)
        y = dequantize(rows, None) if scale is None else rows.to(scale.dtype) * F.embedding(input, scale.unsqueeze(1))
        factor = self._buffers.get("factor")
        return y if factor is None else y * factor


@torch.no_grad()
def row_factor(layer: nn.Module) -> Tensor | None:
    """Return the number, 0-dim, by which an embedding's own forward multiplies its rows; None where it does not.

    Gemma, BART and their families scale so, in a subclass.
    """
    weight = cast(nn.Embedding, layer).weight
    indices = torch.arange(min(16, len(weight)), device=weight.device)
    rows = weight[indices]
    try:
        result = layer.forward(indices)
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError):
        return None
    if not isinstance(result, Tensor) or result.shape != rows.shape or not rows.any():
        return None
    factor = (result * rows).sum() / rows.square().sum()
    return factor if torch.allclose(result, rows * factor, rtol=1e-4, atol=0) else None
