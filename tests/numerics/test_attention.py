"""Attention with products by weights left to the caller is that of PyTorch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.numerics.attention import as_added, attend


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": torch.ones(5, 5).triu(1).bool()},
        {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    ],
    ids=lambda call: "-".join(call) or "plain",
)
def test_results_are_those_of_pytorch(call: dict[str, Any], batch_first: bool) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    x = torch.randn(2, 5, 8) if batch_first else torch.randn(5, 2, 8)

    def project(*sources: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(sources[0], layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1))

    with torch.no_grad():
        expected, weights = layer(x, x, x, **call)
        actual, own_weights = attend(layer, project, layer.out_proj, x, x, x, **call)
    torch.testing.assert_close(actual, expected)
    assert (weights is None) == (own_weights is None)
    if weights is not None:
        torch.testing.assert_close(own_weights, weights)


def test_boolean_masks_hide_and_others_are_added_as_they_are() -> None:
    mask = torch.tensor([True, False])
    assert as_added(mask, torch.float32).tolist() == [-torch.inf, 0.0]
    added = torch.tensor([0.5, -1.0])
    assert as_added(added, torch.float32) is added
