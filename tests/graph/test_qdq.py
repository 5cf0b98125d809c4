"""Layers in QDQ form hold integers, and biases in the steps of their products."""

import functools

import torch
from models import ResidualNet, with_statistics
from prepared_graphs import evaluated, quantized_layers
from torch import nn

from lightning_quant.export.convert import convert
from lightning_quant.recipe.recipe import Recipe

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


UNCORRECTED = Recipe(name="uncorrected", bias_correction=False)


ready = functools.partial(evaluated, recipe=UNCORRECTED)


def test_quantized_layers_hold_integers_only() -> None:
    model = with_statistics(ResidualNet()).eval()
    converted = convert(ready(model, IMAGE))
    found = quantized_layers(converted)
    assert len(found) == 4
    assert not list(converted.parameters())
    for layer in found:
        assert (layer.weight.dtype, layer.bias.dtype) == (torch.int8, torch.int32)
        assert layer.weight.min() >= -127
        assert layer.weight_scale.shape == layer.bias_scale.shape == layer.bias.shape == layer.weight.shape[:1]
    weights = sum(layer.weight.numel() for layer in found)
    assert weights == sum(p.numel() for p in model.parameters() if p.dim() > 1)


def test_biases_are_in_steps_of_input_scale_times_weight_scale() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(32, 6)
    prepared = ready(model, x)
    (layer,) = quantized_layers(convert(prepared))
    input_scale, _ = prepared.ranges.parameters(":input")
    expected = model[0].weight.detach().abs().amax(1) / 127 * input_scale
    torch.testing.assert_close(layer.bias_scale, expected)
    torch.testing.assert_close(
        layer.bias * layer.bias_scale, model[0].bias.detach(), atol=expected.max().item(), rtol=0
    )
