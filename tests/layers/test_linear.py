"""Linear layers in every scheme against the float layer."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from layer_models import Around
from stored_layers import DYNAMIC, HALVES, check, quantized
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_quant.errors import PlanError
from lightning_quant.layers.storage import SCHEMES
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.recipe.recipe import LayerRecipe


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(5, 64), (64,), (2, 3, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(scheme: str, shape: tuple[int, ...], bias: bool) -> None:
    check(nn.Linear(64, 24, bias=bias), torch.randn(shape), scheme=scheme, exact=scheme != DYNAMIC)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_conv1d_of_transformers(scheme: str) -> None:
    check(Conv1D(24, 64), torch.randn(2, 5, 64), scheme=scheme, exact=scheme != DYNAMIC, transposed=True)


@pytest.mark.parametrize("name", HALVES)
def test_linear_computes_in_half_precision_in_torch(name: str) -> None:
    layer, x = nn.Linear(64, 24), torch.randn(5, 64)
    model = quantized(Around(layer), x, scheme=name).quantized()
    dtype = getattr(torch, name)
    with torch.no_grad():
        expected = F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype)).float()
        assert torch.equal(model(x), expected)


def test_four_bits_need_whole_groups() -> None:
    recipe = LayerRecipe("int4", ("weight_only_4bit", "weight_only"), floor_db=0.0)
    result = quantize_layers(Around(nn.Linear(48, 24)).eval(), (torch.randn(3, 48),), recipe=recipe)
    assert [(row.action, row.reason) for row in result.plan.rows] == [
        ("int8 weights", "int4 weights: its 48 input features do not divide into groups of 32")
    ]
    with pytest.raises(PlanError, match=r"layer \(Linear\): int4 weights: its 48 input features do not divide"):
        quantized(Around(nn.Linear(48, 24)), torch.randn(3, 48), scheme="weight_only_4bit")
    odd = LayerRecipe("odd", ("weight_only_4bit",), floor_db=0.0, group_size=5)
    with pytest.raises(PlanError, match="its 15 input features do not divide into groups of 5"):
        quantize_layers(Around(nn.Linear(15, 24)).eval(), (torch.randn(3, 15),), recipe=odd)
