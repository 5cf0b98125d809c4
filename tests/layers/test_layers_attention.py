"""Attention in every scheme against the float layer."""

from typing import Any

import pytest
import torch
from stored_layers import DYNAMIC, WEIGHT_ONLY, check
from torch import nn

pytestmark = [
    # PyTorch's advice on the encoder's fused kernels and on weight normalization.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
]


def attention_calls() -> dict[str, tuple[dict[str, Any], dict[str, Any], bool]]:
    """Return name to the layer's options, the call's options, and whether query, key and value are one tensor."""
    causal = torch.ones(5, 5).triu(1).bool()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    additive = torch.zeros(5, 5).masked_fill(causal, -1e4)
    return {
        "plain": ({}, {}, True),
        "batch first": ({"batch_first": True}, {}, True),
        "without bias": ({"bias": False, "batch_first": True}, {}, True),
        "without weights": ({"batch_first": True}, {"need_weights": False}, True),
        "weights of each head": ({}, {"average_attn_weights": False}, True),
        "boolean mask": ({}, {"attn_mask": causal}, True),
        "boolean mask without weights": ({}, {"attn_mask": causal, "need_weights": False}, True),
        "additive mask": ({"batch_first": True}, {"attn_mask": additive}, True),
        "mask of each head": ({}, {"attn_mask": additive.expand(4, 5, 5)}, True),
        "causal": ({}, {"attn_mask": causal, "is_causal": True, "need_weights": False}, True),
        "padding": ({"batch_first": True}, {"key_padding_mask": padding}, True),
        "padding without weights": ({}, {"key_padding_mask": padding, "need_weights": False}, True),
        "both masks": ({}, {"key_padding_mask": padding, "attn_mask": causal}, True),
        "float padding": ({}, {"key_padding_mask": padding * -1e4}, True),
        "other sources": ({}, {}, False),
        "other widths": ({"kdim": 12, "vdim": 20}, {}, False),
        "other widths without bias": ({"kdim": 12, "vdim": 20, "bias": False, "batch_first": True}, {}, False),
    }


@pytest.mark.parametrize("scheme", ["weight_only", "dynamic", "bfloat16"])
@pytest.mark.parametrize("name", attention_calls())
def test_attention(name: str, scheme: str) -> None:
    options, call, one_source = attention_calls()[name]
    layer = nn.MultiheadAttention(32, 2, **options).eval()
    if layer.in_proj_bias is not None:
        nn.init.normal_(layer.in_proj_bias)
        nn.init.normal_(layer.out_proj.bias)
    lengths = (2, 5) if layer.batch_first else (5, 2)
    key_lengths = lengths if one_source else ((2, 7) if layer.batch_first else (7, 2))
    query = torch.randn(*lengths, 32)
    sources = [torch.randn(*key_lengths, options.get(size, 32)) for size in ("kdim", "vdim")]
    check(layer, *((query,) * 3 if one_source else (query, *sources)), scheme=scheme, exact=scheme != DYNAMIC, **call)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_without_a_batch(need_weights: bool) -> None:
    layer, x = nn.MultiheadAttention(32, 2).eval(), torch.randn(5, 32)
    mask = torch.tensor([False, False, False, True, True])
    check(layer, x, x, x, key_padding_mask=mask, need_weights=need_weights, scheme=WEIGHT_ONLY)
    check(layer, query=x, key=torch.randn(7, 32), value=torch.randn(7, 32), scheme=WEIGHT_ONLY)


def test_attention_with_tokens_of_its_own() -> None:
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        check(nn.MultiheadAttention(32, 2, **options), *[torch.randn(5, 2, 32)] * 3, scheme=WEIGHT_ONLY)
