"""Every layer in every scheme against the float layer, and against a float layer whose weights were rounded here."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from layer_models import Around, Packed, rounded, with_rounded_weights
from lightning_models import decibels, equal_tensors, tensors_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers.pytorch_utils import Conv1D

from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.errors import PlanError
from lightning_quant.layers.storage import SCHEMES
from lightning_quant.planned.layerwise import Layerwise, quantize_layers
from lightning_quant.recipe.recipe import LayerRecipe

pytestmark = [
    # PyTorch's advice on the encoder's fused kernels and on weight normalization.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
]
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


# --- linear


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


# --- embedding


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


# --- recurrent


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("scheme", ["weight_only", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"batch_first": True, "bias": False},
        {"num_layers": 2, "dropout": 0.5, "bidirectional": True, "batch_first": True},
    ],
    ids=["plain", "stacked both ways", "batch first without bias", "dropout"],
)
def test_recurrent(kind: str, scheme: str, options: dict[str, Any]) -> None:
    layer = getattr(nn, kind)(16, 8, **options).eval()
    x = torch.randn(4, 3, 16)
    check(layer, x, scheme=scheme)
    check(layer, x[0], scheme=scheme)
    states = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    hidden = torch.randn(states, 4 if options.get("batch_first") else 3, 8)
    check(layer, x, (hidden, -hidden) if kind == "LSTM" else hidden, scheme=scheme)
    check(layer, x, hx=(hidden, -hidden) if kind == "LSTM" else hidden, scheme=scheme)
    check(layer, input=x, scheme=scheme)


def test_recurrent_with_relu() -> None:
    check(nn.RNN(16, 8, nonlinearity="relu"), torch.randn(4, 3, 16), scheme=WEIGHT_ONLY)


def test_unbatched_state() -> None:
    layer, state = nn.LSTM(16, 8, bidirectional=True), torch.randn(2, 8)
    check(layer, torch.randn(5, 16), (state, -state), scheme=WEIGHT_ONLY)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_packed_sequences(kind: str) -> None:
    model, x, lengths = Packed(kind).eval(), torch.randn(3, 6, 16), torch.tensor([6, 2, 4])
    result = quantized(model, x, lengths)
    assert [row.action for row in result.plan.rows] == ["int8 weights"]
    with torch.no_grad():
        actual, expected = result.quantized()(x, lengths), with_rounded_weights(model, "int8")(x, lengths)
        other = result.quantized()(x[:2, :5], lengths[1:]), with_rounded_weights(model, "int8")(x[:2, :5], lengths[1:])
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*other)
    assert (actual[1, 2:] == 0).all()


def test_recurrence_keeps_no_float_weights() -> None:
    layer = quantized(Around(nn.LSTM(16, 8)), torch.randn(4, 16)).layers["layer"]
    with torch.no_grad():
        layer(torch.randn(4, 16))
    held = [t for t in vars(layer._float_layer).get("_flat_weights", []) if isinstance(t, Tensor)]
    assert all(tensor.is_meta for tensor in (*held, *layer._float_layer.parameters()))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_projected_state() -> None:
    check(nn.LSTM(16, 8, 2, proj_size=4, bidirectional=True), torch.randn(4, 3, 16), scheme=WEIGHT_ONLY)


class Loop(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x:
            state = self.cell(step) if state is None else self.cell(step, hx=state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


@pytest.mark.parametrize("scheme", ["weight_only", "dynamic", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(kind: str, scheme: str) -> None:
    cell = getattr(nn, kind)(16, 32)
    exact = scheme != DYNAMIC
    for x in (torch.randn(3, 16), torch.randn(16)):
        check(cell, x, scheme=scheme, exact=exact)
    state = torch.randn(3, 32)
    check(cell, torch.randn(3, 16), (state, -state) if kind == "LSTMCell" else state, scheme=scheme, exact=exact)
    check(Loop(cell), torch.randn(4, 3, 16), scheme=scheme, exact=exact)
    check(getattr(nn, kind)(16, 32, bias=False), input=torch.randn(3, 16), scheme=scheme, exact=exact)


# --- attention


def attention_calls() -> dict[str, tuple[dict[str, Any], dict[str, Any], bool]]:
    """Return name to the layer's options, the call's options, and whether query, key and value are one tensor."""
    causal = torch.ones(5, 5).triu(1).bool()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    additive = torch.zeros(5, 5).masked_fill(causal, -1e4)
    return {
        "plain": ({}, {}, True),
        "batch first": ({"batch_first": True}, {}, True),
        "without bias": ({"bias": False, "batch_first": True}, {}, True),
        "without weights": ({"batch_first": True}, {"need_weights": False}, True),
        "weights of each head": ({}, {"average_attn_weights": False}, True),
        "boolean mask": ({}, {"attn_mask": causal}, True),
        "boolean mask without weights": ({}, {"attn_mask": causal, "need_weights": False}, True),
        "additive mask": ({"batch_first": True}, {"attn_mask": additive}, True),
        "mask of each head": ({}, {"attn_mask": additive.expand(4, 5, 5)}, True),
        "causal": ({}, {"attn_mask": causal, "is_causal": True, "need_weights": False}, True),
        "padding": ({"batch_first": True}, {"key_padding_mask": padding}, True),
        "padding without weights": ({}, {"key_padding_mask": padding, "need_weights": False}, True),
        "both masks": ({}, {"key_padding_mask": padding, "attn_mask": causal}, True),
        "float padding": ({}, {"key_padding_mask": padding * -1e4}, True),
        "other sources": ({}, {}, False),
        "other widths": ({"kdim": 12, "vdim": 20}, {}, False),
        "other widths without bias": ({"kdim": 12, "vdim": 20, "bias": False, "batch_first": True}, {}, False),
    }


@pytest.mark.parametrize("scheme", ["weight_only", "dynamic", "bfloat16"])
@pytest.mark.parametrize("name", attention_calls())
def test_attention(name: str, scheme: str) -> None:
    options, call, one_source = attention_calls()[name]
    layer = nn.MultiheadAttention(32, 2, **options).eval()
    if layer.in_proj_bias is not None:
        nn.init.normal_(layer.in_proj_bias)
        nn.init.normal_(layer.out_proj.bias)
    lengths = (2, 5) if layer.batch_first else (5, 2)
    key_lengths = lengths if one_source else ((2, 7) if layer.batch_first else (7, 2))
    query = torch.randn(*lengths, 32)
    sources = [torch.randn(*key_lengths, options.get(size, 32)) for size in ("kdim", "vdim")]
    check(layer, *((query,) * 3 if one_source else (query, *sources)), scheme=scheme, exact=scheme != DYNAMIC, **call)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_without_a_batch(need_weights: bool) -> None:
    layer, x = nn.MultiheadAttention(32, 2).eval(), torch.randn(5, 32)
    mask = torch.tensor([False, False, False, True, True])
    check(layer, x, x, x, key_padding_mask=mask, need_weights=need_weights, scheme=WEIGHT_ONLY)
    check(layer, query=x, key=torch.randn(7, 32), value=torch.randn(7, 32), scheme=WEIGHT_ONLY)


def test_attention_with_tokens_of_its_own() -> None:
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        check(nn.MultiheadAttention(32, 2, **options), *[torch.randn(5, 2, 32)] * 3, scheme=WEIGHT_ONLY)


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


def encoder(layers: int = 2, **options: Any) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, **options), layers).eval()


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


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


def test_decoder_layer() -> None:
    layer = nn.TransformerDecoderLayer(32, 2, 64, batch_first=True).eval()
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    result = quantized(Around(layer), x, memory, scheme=DYNAMIC)
    # The attention that the decoder's two layers compute between their projections has rows of its own.
    assert len([row for row in result.plan.rows if row.action != "float"]) == 4
    with torch.no_grad():
        assert 30 < decibels(layer(x, memory), result.quantized()(x, memory)) < 80


# --- weights that are computed


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


def test_weight_norm_of_a_recurrent_layer_is_not_dropped() -> None:
    layer = nn.GRU(16, 8)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    layer.parametrizations.weight_hh_l0.original0.data *= 3
    x = torch.randn(4, 3, 16)
    with torch.no_grad():
        expected = layer(x)[0]
        assert decibels(expected, quantized(Around(layer), x).quantized()(x)[0]) > 30


def test_attributes_that_are_no_weights_are_left_alone() -> None:
    layer, x = nn.Linear(32, 16), torch.randn(5, 32)
    layer.statistics = torch.randn(7, 3)
    model = quantized(Around(layer), x).quantized()
    assert sorted(name for name, _ in model.named_buffers()) == ["layer.weight", "layer.weight_scale"]
    assert sorted(name for name, _ in model.named_parameters()) == ["layer.bias"]


# --- what code outside sees of a stored layer


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
