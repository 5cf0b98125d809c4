"""Every layer in every scheme against the float layer, and against a float layer whose weights were rounded here."""

from typing import Any

import pytest
import torch
from encoders import PADDING, encoder
from layer_models import Around
from lightning_models import decibels
from stored_layers import DYNAMIC, FLOORS_DB, WEIGHT_ONLY, check, quantized
from torch import nn

from lightning_quant.planned.layerwise import quantize_layers

pytestmark = [
    # PyTorch's advice on the encoder's fused kernels and on weight normalization.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
]


# --- convolutions


@pytest.mark.parametrize("scheme", ["weight_only", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, dilation=2, bias=False), (2, 4, 9, 8)),
        (nn.Conv2d(4, 8, 3, groups=4, padding="same", padding_mode="circular"), (2, 4, 9, 8)),
        (nn.Conv3d(2, 3, 3), (2, 2, 5, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 9, 8)),
        (nn.ConvTranspose3d(2, 3, 3), (2, 2, 5, 5, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_convolutions(layer: nn.Module, shape: tuple[int, ...], scheme: str) -> None:
    check(layer, torch.randn(shape), scheme=scheme)
    check(layer, input=torch.randn(shape), scheme=scheme)


def test_transposed_convolution_takes_an_output_size() -> None:
    layer, x = nn.ConvTranspose2d(4, 6, 3, stride=2), torch.randn(2, 4, 5, 5)
    check(layer, x, output_size=[12, 12], scheme=WEIGHT_ONLY)
    check(layer, x, [12, 12], scheme=WEIGHT_ONLY)


# --- PyTorch's encoders, whose fused kernels take float weights


@pytest.mark.parametrize("scheme", ["weight_only", "dynamic", "bfloat16"])
@pytest.mark.parametrize("call", [{}, {"src_key_padding_mask": PADDING}], ids=["plain", "padding"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder(scheme: str, call: dict[str, Any], activation: str) -> None:
    model, x = Around(encoder(activation=activation)), torch.randn(2, 5, 32)
    result = quantized(model, x, scheme=scheme, **call)
    assert len([row for row in result.plan.rows if row.weights]) == 6
    with torch.no_grad():
        reference, actual = model.train(False)(x, **call), result.quantized()(x, **call)
    seen = ~call["src_key_padding_mask"] if call else torch.ones(2, 5, dtype=torch.bool)
    assert FLOORS_DB[scheme] < decibels(reference[seen], actual[seen]) < 80


@pytest.mark.parametrize("exclude", [("layer.layers.0.self_attn", "layer.layers.1.self_attn"), ("Linear",)])
def test_encoder_of_which_a_part_stays_float(exclude: tuple[str, ...]) -> None:
    from lightning_quant.graph.table import Selection

    model, x = Around(encoder()), torch.randn(2, 5, 32)
    selection = Selection(exclude=exclude)
    result = quantize_layers(model, (x,), recipe="int8_weight_only", selection=selection)
    with torch.no_grad():
        assert 30 < decibels(model(x), result.quantized()(x)) < 80


def test_decoder_layer() -> None:
    layer = nn.TransformerDecoderLayer(32, 2, 64, batch_first=True).eval()
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    result = quantized(Around(layer), x, memory, scheme=DYNAMIC)
    # The attention that the decoder's two layers compute between their projections has rows of its own.
    assert len([row for row in result.plan.rows if row.action != "float"]) == 4
    with torch.no_grad():
        assert 30 < decibels(layer(x, memory), result.quantized()(x, memory)) < 80
