"""GPTQ on stored weights: less output error for every layer, scales as they were, ties untouched."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.layers.refine import refine
from lightning_quant.layers.storage import dequantize
from lightning_quant.planned.layerwise import quantize_layers


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


class Block(nn.Module):
    """Attention and a feed-forward net, with a LayerNorm behind each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.merge = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        heads = [layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = self.first(x + self.merge(mixed))
        return self.second(x + self.narrow(F.gelu(self.widen(x))))


class Encoder(nn.Module):
    """Two blocks over embedded tokens."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(200, width), nn.Embedding(24, width)
        self.blocks = nn.Sequential(Block(width), Block(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.blocks(self.tokens(tokens) + self.places(torch.arange(tokens.shape[1])))


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_every_layer_of_a_transformer_has_less_output_error(bits: str) -> None:
    torch.manual_seed(0)
    model, generator = Encoder().eval(), torch.Generator().manual_seed(1)
    # Some tokens are much more frequent than others, as in language.
    shares = 1 / torch.arange(1, 201)
    calls = [((torch.multinomial(shares.expand(16, -1), 24, True, generator=generator),), {}) for _ in range(4)]
    quantized = quantize_layers(model, *calls[0], recipe=f"{bits}_weight_only")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    before = {name: dequantize(*quantized.layers[name].stored("weight")).clone() for name in linear}
    seen: dict[str, list[Tensor]] = {name: [] for name in linear}
    for name in linear:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    refine(model, quantized.layers, calls)
    for name in linear:
        x, weight = torch.cat(seen[name]).flatten(0, 1), model.get_submodule(name).weight.detach()
        after = dequantize(*quantized.layers[name].stored("weight"))
        nearest, learned = (float((x @ (w - weight).T).square().sum()) for w in (before[name], after))
        assert learned < 0.9 * nearest


def test_a_weight_that_is_computed_is_rounded_as_it_is() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 8))
    quantized = quantize_layers(model, (correlated(0),), recipe="int4_weight_only")
    before = {name: layer.stored("weight")[0].clone() for name, layer in quantized.layers.items()}
    errors = refine(model, quantized.layers, [((correlated(0),), {})])  # type: ignore[list-item]
    assert all(after < nearest for nearest, after in errors.values())
    assert not any(torch.equal(before[name], layer.stored("weight")[0]) for name, layer in quantized.layers.items())
