"""Embeddings in every scheme against the float layer."""

import pytest
import torch
from layer_models import Around
from lightning_models import decibels
from stored_layers import check, quantized
from torch import nn

from lightning_quant.errors import PlanError


@pytest.mark.parametrize("scheme", ["weight_only", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (1, 1, 4)])
def test_embedding(scheme: str, shape: tuple[int, ...]) -> None:
    check(nn.Embedding(20, 16, padding_idx=3), torch.randint(20, shape), scheme=scheme)


def test_embedding_has_a_scale_for_each_token() -> None:
    layer = nn.Embedding(20, 16)
    layer.weight.data[5] *= 1e6
    ids = torch.tensor([0, 1, 2, 5, 19])
    with torch.no_grad():
        expected, actual = layer(ids), quantized(Around(layer), ids).quantized()(ids)
    assert all(decibels(a, b) > 35 for a, b in zip(expected, actual, strict=True))


def test_embedding_that_renormalizes_stays_float() -> None:
    with pytest.raises(PlanError, match="`max_norm` changes its weights"):
        quantized(Around(nn.Embedding(20, 16, max_norm=1.0)), torch.arange(4))
