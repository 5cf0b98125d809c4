"""`nn.MultiheadAttention` with quantized projections; scores, softmax and weighted sums stay in float."""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.layers.layer import StoredLayer
from lightning_quant.layers.linear import linear
from lightning_quant.layers.storage import Scheme


class StoredAttention(StoredLayer):
    """Multi-head attention whose four projections are stored layers.

    Source: torch.nn.functional.multi_head_attention_forward, PyTorch 2.13.
    """

    # `nn.TransformerEncoderLayer` would pass the weights to a float kernel if this were true.
    _qkv_same_embed_dim = False

    @classmethod
    def refusal(cls, float_layer: nn.Module, scheme: Scheme, group_size: int) -> str:
        """Return why a layer has no such form, or an empty text."""
        if float_layer.bias_k is not None or float_layer.add_zero_attn:
            return "`add_bias_kv` and `add_zero_attn` have no quantized form"
        return "no 4-bit form" if scheme.storage == "int4" else ""

    @classmethod
    def multiply_adds_apart(cls, float_layer: nn.Module, args: Any, kwargs: Any) -> int:
        """Return those of scores and weighted sums, which stay in float."""
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        query, key = given["query"], given["key"]
        length = key.shape[1 if float_layer.batch_first and query.dim() == 3 else 0]
        return 2 * query.numel() * length

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention.forward` does; shapes and masks are as there."""
        layer = self._float_layer
        one_source, batched = query is key and key is value, query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not layer.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        projected = self._project_one(query) if one_source else self._project_each(query, key, value)
        heads = [x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x in projected]
        mask = _merged(attn_mask, key_padding_mask, heads[0], layer.num_heads)
        weights = None
        if need_weights:
            scores = heads[0] @ heads[1].transpose(-2, -1) / math.sqrt(heads[0].shape[-1])
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            mixed = weights @ heads[2]
        else:
            mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=mask)
        output = self._output(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if layer.batch_first else output.transpose(0, 1), weights

    def _project_one(self, x: Tensor) -> tuple[Tensor, ...]:
        if "in_proj_weight" not in self.names:
            return self._project_each(x, x, x)
        bias = self._parameters.get("in_proj_bias")
        return linear(x, *self.stored("in_proj_weight"), bias, self.scheme.arithmetic).chunk(3, -1)

    def _project_each(self, *sources: Tensor) -> tuple[Tensor, ...]:
        if "in_proj_weight" in self.names:
            weight, scale = self.stored("in_proj_weight")
            scales = (None,) * 3 if scale is None else scale.chunk(3)
            stored = list(zip(weight.chunk(3), scales, strict=True))
        else:
            stored = [self.stored(name) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        bias = self._parameters.get("in_proj_bias")
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        arithmetic = self.scheme.arithmetic
        return tuple(linear(x, *w, b, arithmetic) for x, w, b in zip(sources, stored, biases, strict=True))

    def _output(self, x: Tensor) -> Tensor:
        return linear(x, *self.stored("out_proj.weight"), self._parameters.get("out_proj_bias"), self.scheme.arithmetic)


def _merged(attn_mask: Any, key_padding_mask: Any, queries: Tensor, num_heads: int) -> Tensor | None:
    """Return one mask to add to scores `(batch, heads, queries, keys)`; boolean masks are true where not to attend."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (-1, num_heads)) if attn_mask.dim() == 3 else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    added = [
        torch.zeros_like(mask, dtype=queries.dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask
        for mask in masks
    ]
    return sum(added) if added else None  # type: ignore[return-value]
