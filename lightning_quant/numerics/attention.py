"""What `nn.MultiheadAttention` computes, with products by weights left to the caller."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Project = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def attend(
    layer: nn.MultiheadAttention,
    project: Project,
    finish: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend as `nn.MultiheadAttention.forward` does; shapes and masks are as there.

    Args:
        layer: for its settings; its weights are not read.
        project: makes queries, keys and values, each `(batch, length, features)`, of the three sources.
        finish: the output projection.
        query: source of the queries.
        key: source of the keys.
        value: source of the values.
        key_padding_mask: as there.
        need_weights: as there.
        attn_mask: as there.
        average_attn_weights: as there.
        is_causal: a hint for kernels; what is masked, the mask says itself.

    Source: torch.nn.functional.multi_head_attention_forward, PyTorch 2.13, without `add_bias_kv` and `add_zero_attn`.
    """
    batched, dropout = query.dim() == 3, layer.dropout if layer.training else 0.0
    one_source = query is key and key is value
    sources = [query] if one_source else [query, key, value]
    if not batched:
        sources = [x.unsqueeze(0) for x in sources]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not layer.batch_first:
        sources = [x.transpose(0, 1) for x in sources]
    projected = project(*(sources * 3 if one_source else sources))
    heads = [x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x in projected]
    mask = _merged(attn_mask, key_padding_mask, heads[0], layer.num_heads)
    weights = None
    if need_weights:
        scores = heads[0] @ heads[1].transpose(-2, -1) / math.sqrt(layer.head_dim)
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        weights = F.dropout(weights, dropout) if dropout else weights
        mixed = weights @ heads[2]
    else:
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=mask, dropout_p=dropout)
    output = finish(mixed.transpose(1, 2).flatten(2))
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    if not batched:
        return output.squeeze(0), None if weights is None else weights.squeeze(0)
    return output if layer.batch_first else output.transpose(0, 1), weights


def as_added(mask: Any, dtype: torch.dtype) -> Any:
    """Return a mask to add to scores; boolean ones are true where not to attend."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask


def _merged(attn_mask: Any, key_padding_mask: Any, queries: Tensor, num_heads: int) -> Tensor | None:
    """Return one mask to add to scores `(batch, heads, queries, keys)`."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (-1, num_heads)) if attn_mask.dim() == 3 else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    added = [as_added(mask, queries.dtype) for mask in masks]
    return None if not added else added[0] if len(added) == 1 else added[0] + added[1]
