"""Recipes of layers refuse what is not finite, by name; each computed weight keeps its own integers."""

import pytest
import torch
from layer_models import LAYER_RECIPES, Around, TokenClassifier, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from lightning_quant.errors import CalibrationError
from lightning_quant.graph.table import Selection
from lightning_quant.layers import class_for
from lightning_quant.layers.layer import from_float, plain
from lightning_quant.layers.storage import SCHEMES
from lightning_quant.planned.layerwise import quantize_layers

X = torch.randn(4, 6)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).eval()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("recipe", LAYER_RECIPES)
def test_weights_that_are_not_finite_are_refused_by_name(recipe: str, value: float) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[1, 3] = value
    with pytest.raises(CalibrationError, match="`weight` of '2' has NaN or infinite values"):
        quantize_layers(model, (X,), recipe=recipe)


def test_biases_recurrent_weights_and_layers_that_stay_float_are_looked_at() -> None:
    model = net()
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    with pytest.raises(CalibrationError, match="`bias` of '0'"):
        quantize_layers(model, (X,), recipe="int8_dynamic", selection=Selection(exclude=("0",)))
    recurrent = TokenClassifier().eval()
    with torch.no_grad():
        recurrent.rnn.weight_hh_l0[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match="`weight_hh_l0` of 'rnn'"):
        quantize_layers(recurrent, (tokens(),), recipe="int8_weight_only")


def test_large_finite_weights_are_weights() -> None:
    model = Around(nn.Linear(6, 4, bias=False)).eval()
    with torch.no_grad():
        model.layer.weight.mul_(1e37)
    assert quantize_layers(model, (X * 1e-3,), recipe="int8_weight_only").layers


class Roots(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x).sqrt()))


def test_a_call_that_float_answers_with_nan_is_refused_with_the_place() -> None:
    with pytest.raises(CalibrationError, match="float form answers NaN: 'norm' does first"):
        quantize_layers(Roots().eval(), (X,), recipe="int8_weight_only")
    with pytest.raises(CalibrationError, match="its input `input` has NaN"):
        quantize_layers(net(), (X / 0 * 0,), recipe="int8_weight_only")


def test_infinite_values_as_masks_have_them_are_answers() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).masked_fill(torch.tensor([True, False, False, False]), -torch.inf)

    assert quantize_layers(Masked().eval(), (X,), recipe="int8_weight_only").layers


@pytest.mark.parametrize(
    "normalize",
    [parametrizations.weight_norm, parametrizations.spectral_norm, spectral_norm, parametrizations.orthogonal],
    ids=["weight_norm", "spectral_norm", "spectral_norm_hook", "orthogonal"],
)
def test_every_computed_weight_has_integers_of_its_own(normalize: object) -> None:
    # So many of one shape that the memory of one would be another's after it was let go.
    layers = [normalize(nn.Linear(48, 48)) for _ in range(12)]  # type: ignore[operator]
    quantized = quantize_layers(nn.Sequential(*layers).eval(), (torch.randn(4, 48),), recipe="int8_weight_only")

    assert [row.action for row in quantized.plan.rows] == ["int8 weights"] * 12
    for name, layer in quantized.layers.items():
        integers, scale = layer.stored("weight")
        weight = layers[int(name)].weight.detach()
        assert (integers * scale[:, None] - weight).abs().max() <= scale.max() / 2 + 1e-6


def test_a_computed_weight_lives_as_long_as_its_address_says_whose_integers_are_kept() -> None:
    # Whether memory that was let go comes back at once depends on the machine and on what ran before.
    layer, known = parametrizations.weight_norm(nn.Linear(48, 48)), {}
    from_float(class_for(layer), plain(layer), SCHEMES["weight_only"], 32, known)  # type: ignore[arg-type]

    assert known
    assert all(weight.data_ptr() == address for (address, *_), (weight, _) in known.items())
