"""What code outside sees of a stored layer."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from layer_models import Around, rounded
from lightning_models import decibels, equal_tensors, tensors_of
from stored_layers import WEIGHT_ONLY, quantized
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from lightning_quant.layers.storage import SCHEMES

pytestmark = [
    # PyTorch's advice on the encoder's fused kernels and on weight normalization.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
]


@pytest.mark.parametrize(
    "normalize",
    [
        pytest.param(parametrizations.weight_norm, id="weight_norm"),
        pytest.param(parametrizations.spectral_norm, id="spectral_norm"),
        pytest.param(parametrizations.orthogonal, id="orthogonal"),
        pytest.param(weight_norm, id="weight_norm with hooks"),
        pytest.param(spectral_norm, id="spectral_norm with hooks"),
        pytest.param(lambda layer: prune.l1_unstructured(layer, "weight", 0.5), id="pruned"),
    ],
)
@pytest.mark.parametrize("scheme", ["weight_only", "dynamic"])
def test_computed_weights(normalize: Any, scheme: str) -> None:
    layer = nn.Linear(32, 16)
    normalize(layer)
    layer.eval()
    x = torch.randn(5, 32)
    with torch.no_grad():
        layer(x)
    before = tensors_of(layer)
    result = quantized(Around(layer), x, scheme=scheme)
    with torch.no_grad():
        expected, actual = layer(x), result.quantized()(x)
        rounding = F.linear(x, rounded(layer.weight.detach(), "int8"), layer.bias)
    assert [(row.kind, row.action) for row in result.plan.rows] == [("Linear", SCHEMES[scheme].action)]
    assert 30 < decibels(expected, actual) < 80
    if scheme == WEIGHT_ONLY:
        torch.testing.assert_close(actual, rounding)
    assert equal_tensors(tensors_of(layer), before)
    # One weight is stored; what it was computed from is not.
    assert sorted(name for name, _ in result.quantized().named_parameters()) == ["layer.bias"]
    assert sorted(name for name, _ in result.quantized().named_buffers()) == ["layer.weight", "layer.weight_scale"]


def test_attributes_that_are_no_weights_are_left_alone() -> None:
    layer, x = nn.Linear(32, 16), torch.randn(5, 32)
    layer.statistics = torch.randn(7, 3)
    model = quantized(Around(layer), x).quantized()
    assert sorted(name for name, _ in model.named_buffers()) == ["layer.weight", "layer.weight_scale"]
    assert sorted(name for name, _ in model.named_parameters()) == ["layer.bias"]


def test_stored_layer_answers_for_the_float_one() -> None:
    layer = quantized(Around(nn.Conv2d(3, 8, 3, stride=2)), torch.randn(1, 3, 9, 9)).layers["layer"]
    assert (layer.stride, layer.out_channels, layer.kernel_size) == ((2, 2), 8, (3, 3))
    assert "Conv2d, int8 weights" in repr(layer)
    with pytest.raises(AttributeError, match="no_such"):
        _ = layer.no_such
    duplicate = copy.deepcopy(layer)
    assert duplicate.stored("weight")[0] is not layer.stored("weight")[0]
    assert duplicate.stride == (2, 2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weight_can_be_asked_for_its_form_but_not_used(scheme: str) -> None:
    layer = quantized(Around(nn.Linear(64, 24)), torch.randn(3, 64), scheme=scheme).layers["layer"]
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == ((24, 64), torch.float32, "cpu")
    assert (torch.ones(64) + layer.weight).isnan().all()
    assert layer.state_dict().keys() - {"weight_scale"} == {"weight", "bias"}
    assert not any(t.isnan().any() for t in layer.state_dict().values())
