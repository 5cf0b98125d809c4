"""Layers in stored form beside the float ones, and beside float ones whose weights were rounded here."""

from typing import Any

import torch
from layer_models import Around, with_rounded_weights
from lightning_models import decibels
from torch import nn

from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.layers.storage import SCHEMES
from lightning_quant.planned.layerwise import Layerwise, quantize_layers
from lightning_quant.recipe.recipe import LayerRecipe

WEIGHT_ONLY, DYNAMIC, HALVES = "weight_only", "dynamic", ("float16", "bfloat16")
FLOORS_DB = {"weight_only": 30.0, "dynamic": 28.0, "weight_only_4bit": 12.0, "float16": 55.0, "bfloat16": 38.0}


def quantized(
    model: nn.Module, *args: Any, scheme: str = WEIGHT_ONLY, runtime: str = "torch", **kwargs: Any
) -> Layerwise:
    recipe = LayerRecipe("one", (scheme,), floor_db=0.0, bias_correction=False)
    return quantize_layers(model.eval(), args, kwargs, recipe=recipe, runtime=runtime)


def check(
    layer: nn.Module, *args: Any, scheme: str, exact: bool = True, transposed: bool = False, **kwargs: Any
) -> None:
    """Compare a quantized layer with the float one, and where the arithmetic is float with the rounded one."""
    # As the runtime that computes in float has it: half precision is for storage there.
    runtime = "onnxruntime" if scheme in HALVES else "torch"
    result = quantized(Around(layer), *args, scheme=scheme, runtime=runtime, **kwargs)
    assert [row.action for row in result.plan.rows if row.weights] == [SCHEMES[scheme].action]
    model = result.quantized()
    with torch.no_grad():
        expected, actual = layer(*args, **kwargs), model(*args, **kwargs)
        reference = with_rounded_weights(layer, SCHEMES[scheme].storage, transposed=transposed)(*args, **kwargs)
    leaves = [tensor_leaves(output) for output in (expected, actual, reference)]
    assert [leaf.shape for leaf in leaves[0]] == [leaf.shape for leaf in leaves[1]]
    for floating, ours, rounding in zip(*leaves, strict=True):
        assert not torch.equal(floating, ours)
        assert decibels(floating, ours) > FLOORS_DB[scheme]
        if exact:
            torch.testing.assert_close(ours, rounding, rtol=1e-4, atol=2e-5)
