"""GPTQ on stored weights: less output error for every layer, scales as they were, ties untouched."""

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.layers.refine import refine
from lightning_quant.layerwise import quantize_layers


class Tied(nn.Module):
    """Two linear layers of their own and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.left, self.right = nn.Linear(64, 64), nn.Linear(64, 64)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.right(torch.relu(self.left(self.second(torch.relu(self.first(x))))))


def correlated(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(128, 16, generator=generator) @ torch.randn(16, 64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("recipe", ["int8_weight_only", "int4_weight_only"])
def test_every_layer_has_less_output_error(recipe: str) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    calls = [((correlated(seed),), {}) for seed in range(3)]
    quantized = quantize_layers(model, *calls[0], recipe=recipe)
    scales = {name: layer.stored("weight")[1].clone() for name, layer in quantized.layers.items()}
    before = {name: layer.stored("weight")[0].clone() for name, layer in quantized.layers.items()}
    errors = refine(model, quantized.layers, calls)
    assert set(errors) == {"first", "second"}
    for nearest, learned in errors.values():
        assert learned < 0.8 * nearest
    for name, layer in quantized.layers.items():
        stored, scale = layer.stored("weight")
        assert torch.equal(scale, scales[name])
        assert torch.equal(stored, before[name]) == (name in ("left", "right"))


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_the_recipe_applies_it(bits: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    x = correlated(1)
    with torch.no_grad():
        exact = model(x)
        errors = []
        for recipe in (f"{bits}_weight_only", f"{bits}_weight_only_gptq"):
            with quantize_layers(model, (x,), recipe=recipe).attached():
                errors.append(float((model(x) - exact).square().mean()))
    assert errors[1] < 0.6 * errors[0]
