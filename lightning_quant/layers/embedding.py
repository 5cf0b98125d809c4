"""Embeddings: a row of int8 and its scale for each token."""

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.layers.layer import StoredLayer
from lightning_quant.layers.storage import Scheme, dequantize


class StoredEmbedding(StoredLayer):
    """A table of which only the rows that are asked for become float."""

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
        if scale is None:
            return dequantize(rows, None)
        return rows.to(scale.dtype) * F.embedding(input, scale.unsqueeze(1))
