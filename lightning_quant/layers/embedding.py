"""Embeddings and bags of them: a row of int8 and its scale for each token."""

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.layers.derived import call_derived, is_derived
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
        y = looked_up(input, *self.stored("weight"))
        factor = self._buffers.get("factor")
        return y if factor is None else y * factor


class StoredEmbeddingBag(StoredLayer):
    """Sums, means or maxima of rows of a table, of which only those that are asked for become float."""

    @classmethod
    def refusal(cls, float_layer: nn.Module, scheme: Scheme, group_size: int) -> str:
        """Return why a layer has no such form, or an empty text."""
        return StoredEmbedding.refusal(float_layer, scheme, group_size)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Reduce bags of indices, in the forward of a subclass where the layer is of one."""
        layer = self._float_layer
        if not is_derived(layer):
            return self._reduce(*args, **kwargs)
        values = {name: dequantize(*self.stored(name)) for name in self.names}
        values |= {name: getattr(self, attribute) for name, attribute in self.shared.items()}
        return call_derived(layer, self._reduce, values, args, kwargs)

    def _reduce(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Reduce bags of indices: `(bags, length)`, or `(number,)` with where each bag begins.

        Args:
            input: indices.
            offsets: `(bags,)`, for flat indices.
            per_sample_weights: of the shape of `input`, for sums.
        """
        layer = self._float_layer
        rows = looked_up(input, *self.stored("weight"))
        padding = layer.padding_idx
        padded = torch.zeros_like(input, dtype=torch.bool) if padding is None else input == padding % len(layer.weight)
        if input.dim() == 2:
            return _reduced(rows, padded, layer.mode, per_sample_weights)
        # The row before all others stands for what is padded.
        places = torch.where(padded, 0, torch.arange(1, input.shape[0] + 1, device=input.device))
        table = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
        options = {"mode": layer.mode, "include_last_offset": layer.include_last_offset, "padding_idx": 0}
        return F.embedding_bag(places, table, offsets, per_sample_weights=per_sample_weights, **options)


def _reduced(rows: Tensor, padded: Tensor, mode: str, factors: Tensor | None) -> Tensor:
    """Reduce `(bags, length, features)` over what is not padded; an empty bag gives zeros."""
    if mode == "max":
        lowest = rows.masked_fill(padded.unsqueeze(2), -torch.inf).amax(1)
        return torch.where(padded.all(1, keepdim=True), 0.0, lowest)
    counted = (~padded).to(rows.dtype)
    total = (rows * (counted if factors is None else counted * factors).unsqueeze(2)).sum(1)
    return total if mode == "sum" else total / counted.sum(1, keepdim=True).clamp(min=1)


def looked_up(indices: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return rows of a stored table in float32."""
    rows = F.embedding(indices, weight)
    return dequantize(rows, None) if scale is None else rows.to(scale.dtype) * F.embedding(indices, scale.unsqueeze(1))


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
