"""Layers stand in the places of float ones, for good or while a block runs."""

import copy

import pytest
import torch
from encoders import PADDING, encoder
from layer_models import Around
from lightning_models import decibels
from stored_layers import quantized
from torch import nn

from lightning_quant.layers.placement import placed, standing

pytestmark = [
    # PyTorch's advice on the encoder's fused kernels and on weight normalization.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
]


def test_fused_kernels_are_given_back() -> None:
    model, x = Around(encoder()), torch.randn(2, 5, 32)
    # Someone's own choice, which is not the constructor's.
    model.layer.layers[1].activation_relu_or_gelu = 0
    call = {"src_key_padding_mask": PADDING}
    before = [copy.copy(child.__dict__.get("activation_relu_or_gelu")) for child in model.modules()]
    with torch.no_grad():
        expected = model(x, **call)
        result = quantized(model, x, **call)
        with result.attached():
            assert not model.layer.use_nested_tensor
            assert model.layer.layers[0].activation_relu_or_gelu == 0
            with result.attached():
                pass
            assert not model.layer.use_nested_tensor
            assert decibels(expected[~PADDING], model(x, **call)[~PADDING]) < 80
        assert torch.equal(model(x, **call), expected)
    assert model.layer.use_nested_tensor
    assert [child.__dict__.get("activation_relu_or_gelu") for child in model.modules()] == before
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_stood_in_a_place_comes_back_with_its_hooks_even_after_an_error() -> None:
    model, calls = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2))), []
    handle = model[1][0].register_forward_hook(lambda *_: calls.append(1))
    first, inner = model[0], model[1][0]
    replacement = nn.Linear(4, 2)
    with pytest.raises(KeyError), placed(model, {"1.0": replacement}) as before:  # noqa: PT012
        assert before == {"1.0": inner}
        assert standing(model, "1.0") is replacement
        model(torch.randn(3, 4))
        raise KeyError
    assert calls == [1]
    assert (model[0], model[1][0]) == (first, inner)
    handle.remove()


def test_the_root_itself_is_routed_to_its_layer() -> None:
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    with placed(model, {"": nn.Linear(4, 5)}):
        assert model(x).shape == (3, 5)
    assert model(x).shape == (3, 2)
