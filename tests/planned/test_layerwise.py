"""Quantization layer by layer, on float models that must stay as they are."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from layer_models import LAYER_RECIPES, Around, TokenClassifier, bert, gpt2, llama, t5, tokens
from lightning_models import decibels
from torch import Tensor, nn
from unchanged import State

from lightning_quant.graph.table import Selection
from lightning_quant.layers.layer import StoredLayer
from lightning_quant.planned.layerwise import quantize_layers

FLOORS_DB = {"int8_dynamic": 28, "int8_weight_only": 30, "int4_weight_only": 8, "float16": 50, "bfloat16": 32}
FLOORS_DB |= {f"{name}_gptq": FLOORS_DB[name] for name in ("int8_weight_only", "int4_weight_only")}


def actions(result: Any) -> dict[str, str]:
    return {row.name: row.action for row in result.plan.rows}


def reasons(result: Any) -> dict[str, str]:
    return {row.name: row.reason for row in result.plan.rows}


# --- the float model is the user's


@pytest.mark.parametrize("recipe", LAYER_RECIPES)
def test_float_model_is_left_as_it_was(recipe: str) -> None:
    model = TokenClassifier()
    model.rnn.eval()
    model.head.register_forward_hook(lambda *_: None)
    model.head.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    state, x = State(model), tokens()
    random = torch.get_rng_state()
    result = quantize_layers(model, (x,), recipe=recipe)
    result.quantized()(x)
    with result.attached(), torch.no_grad():
        assert isinstance(model.head, StoredLayer)
        model(x)

    state.assert_unchanged()
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fails = nn.Linear(32, 32), nn.Dropout(), True

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        if self.fails:
            raise KeyError("of the user")
        return x


def test_float_model_is_left_as_it_was_after_errors() -> None:
    model, x = Fails(), torch.randn(3, 32)
    state = State(model)
    with pytest.raises(KeyError, match="of the user"):
        quantize_layers(model, (x,), recipe="int8_weight_only")
    state.assert_unchanged()
    assert torch.backends.mha.get_fastpath_enabled()
    model.fails = False
    result = quantize_layers(model, (x,), recipe="int8_weight_only")
    model.fails = True
    with pytest.raises(KeyError), result.attached():
        model(x)
    state.assert_unchanged()


def test_tensors_that_are_not_stored_are_shared() -> None:
    """But for biases that make up for the error of their layer's weight."""
    model = TokenClassifier()
    result = quantize_layers(model, (tokens(),), recipe="int8_weight_only")
    shared = {id(parameter) for parameter in model.parameters()}
    own = [name for name, parameter in result.quantized().named_parameters() if id(parameter) not in shared]
    assert own == ["head.bias"]
    assert "rnn.bias_ih_l0" in dict(result.quantized().named_parameters())


# --- weights that code reads beside the layer


class Reads(nn.Module):
    """Uses the weight of a layer in one of the ways in which people do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.embedding, self.layer = how, nn.Embedding(20, 16), nn.Linear(16, 16)
        self.positions = nn.Embedding(5, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layer(self.embedding(ids))
        if self.how == "product":
            return x @ self.embedding.weight.t()
        if self.how == "linear":
            return F.linear(x, self.embedding.weight)
        if self.how == "positions":
            return x + self.positions.weight[: x.shape[1]]
        if self.how == "norm":
            return x * self.layer.weight.abs().mean()
        if self.how == "type":
            return self.layer(x.to(self.layer.weight.dtype))
        return x.view(-1, self.layer.weight.shape[0])


@pytest.mark.parametrize("how", ["product", "linear", "positions", "norm"])
@pytest.mark.parametrize("recipe", LAYER_RECIPES)
def test_layer_whose_weight_code_reads_is_stored_and_read_in_float(how: str, recipe: str) -> None:
    model, ids = Reads(how).eval(), torch.randint(20, (2, 5))
    read = {"positions": "positions", "norm": "layer"}.get(how, "embedding")
    result = quantize_layers(model, (ids,), recipe=recipe)
    row = next(row for row in result.plan.rows if row.name == read)
    assert row.action != "float"
    assert row.reason.startswith("code outside it reads its weight, in float")
    with torch.no_grad():
        assert decibels(model(ids), result.quantized()(ids)) > FLOORS_DB[recipe] - 3


@pytest.mark.parametrize("how", ["type", "shape"])
@pytest.mark.parametrize("recipe", LAYER_RECIPES)
def test_type_and_shape_of_a_weight_may_be_asked_for(how: str, recipe: str) -> None:
    model, ids = Reads(how).eval(), torch.randint(20, (2, 5))
    result = quantize_layers(model, (ids,), recipe=recipe)
    with torch.no_grad():
        assert decibels(model(ids), result.quantized()(ids)) > FLOORS_DB[recipe] - 3


# --- ties


def test_tied_weight_is_stored_once() -> None:
    model = TokenClassifier(tied=True).eval()
    for recipe in LAYER_RECIPES:
        result = quantize_layers(model, (tokens(),), recipe=recipe)
        first, second = result.layers["embedding"], result.layers["head"]
        assert first.stored("weight")[0] is second.stored("weight")[0]
        assert first.stored("weight")[1] is second.stored("weight")[1]
        rows = {row.name: row for row in result.plan.rows}
        assert rows["embedding"].weights == 96 * 32
        assert rows["head"].weights == 0
        assert result.plan.stored_share == 1.0
        with torch.no_grad():
            assert decibels(model(tokens()), result.quantized()(tokens())) > FLOORS_DB[recipe]


def test_tied_weight_whose_users_need_different_schemes() -> None:
    result = quantize_layers(TokenClassifier(tied=True).eval(), (tokens(),), recipe="int4_weight_only")
    assert {actions(result)[name] for name in ("embedding", "head")} == {"int8 weights"}
    assert reasons(result)["embedding"] == "int4 weights: embeddings are stored with eight bits for each value"
    assert reasons(result)["head"] == "its weight is that of embedding, which is stored with 8 bits"


@pytest.mark.parametrize(("excluded", "other"), [("embedding", "head"), ("head", "embedding")])
def test_tied_weight_of_which_one_user_is_excluded_stays_float(excluded: str, other: str) -> None:
    model = TokenClassifier(tied=True).eval()
    result = quantize_layers(model, (tokens(),), recipe="int8_weight_only", selection=Selection(exclude=(excluded,)))
    assert reasons(result)[excluded] == f'excluded by "{excluded}"'
    assert (actions(result)[other], actions(result)["rnn"]) == ("float", "int8 weights")
    assert reasons(result)[other] == f"its weight is that of {excluded}, which is stored with 32 bits"
    duplicate = result.quantized()
    assert duplicate.head.weight is duplicate.embedding.weight is model.embedding.weight


def test_tied_weight_of_which_one_user_is_no_layer_stays_float() -> None:
    class Custom(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t()

    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16))
    model.append(Custom(model[0].weight))
    result = quantize_layers(model.eval(), (torch.randint(20, (2, 5)),), recipe="int8_weight_only")
    assert actions(result) == {"0": "float", "1": "int8 weights", "2": "float"}


def test_layer_that_stands_in_two_places_is_one() -> None:
    layer = nn.Linear(16, 16)
    model, x = nn.Sequential(layer, nn.ReLU(), layer).eval(), torch.randn(3, 16)
    result = quantize_layers(model, (x,), recipe="int8_weight_only")
    assert len(result.plan.rows) == 1
    assert result.plan.rows[0].macs == 2 * 3 * 16 * 16
    assert result.layers["0"] is result.layers["2"]
    duplicate = result.quantized()
    assert duplicate[0] is duplicate[2]
    result = quantize_layers(model, (x,), recipe="int8_weight_only", selection=Selection())
    with result.attached():
        assert model[0] is model[2]
    assert model[0] is model[2] is layer


# --- other precisions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_models_of_another_precision(dtype: torch.dtype, kind: str) -> None:
    model = TokenClassifier(tied=True, kind=kind).eval()
    expected = model(tokens()).detach()
    model = model.to(dtype)
    state = State(model)
    result = quantize_layers(model, (tokens(),), recipe="int8_weight_only")
    state.assert_unchanged()
    duplicate = result.quantized()
    assert duplicate.head.stored("weight")[0] is duplicate.embedding.stored("weight")[0]
    with torch.no_grad():
        assert duplicate(tokens()).dtype == torch.float32
        assert decibels(expected, duplicate(tokens())) > 28
    # Recurrent layers keep a list of their weights beside the weights themselves.
    excluded = quantize_layers(
        model, (tokens(),), recipe="int8_weight_only", selection=Selection(exclude=(kind,))
    ).quantized()
    with torch.no_grad():
        assert decibels(expected, excluded(tokens())) > 28


def test_convolutions_of_another_precision() -> None:
    model, x = Around(nn.Conv1d(4, 6, 3)).eval(), torch.randn(2, 4, 9)
    expected = model(x).detach()
    result = quantize_layers(model.bfloat16(), (x.bfloat16(),), recipe="int8_weight_only")
    assert decibels(expected, result.quantized()(x).detach()) > 28


@pytest.mark.parametrize("recipe", LAYER_RECIPES)
def test_under_autocast(recipe: str) -> None:
    """Mixed precision evaluates quantized layers in the middle of float ones."""
    model = TokenClassifier().eval()
    result = quantize_layers(model, (tokens(),), recipe=recipe).quantized()
    encoder = nn.TransformerEncoderLayer(32, 2, 64).eval()
    x = torch.randn(5, 2, 32)
    attention = quantize_layers(encoder, (x,), recipe=recipe).quantized()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert decibels(model(tokens()).float(), result(tokens()).float()) > 8
        assert decibels(encoder(x).float(), attention(x).float()) > 8


# --- the numbers of the plan


# --- models of transformers


@pytest.mark.parametrize("recipe", LAYER_RECIPES)
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "t5"])
def test_models_of_transformers(name: str, recipe: str) -> None:
    model = {"gpt2": gpt2, "bert": bert, "llama": llama, "t5": t5}[name]()
    state = State(model)
    call = {"input_ids": tokens(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    if name == "t5":
        call["decoder_input_ids"] = tokens(length=5, seed=1)
    result = quantize_layers(model, kwargs=call, recipe=recipe)
    state.assert_unchanged()
    assert result.plan.stored_share > 0.95
    # What no layer computes is attention: products of activations.
    floats = [row for row in result.plan.rows if row.action == "float"]
    assert {row.kind for row in floats} <= {"bmm", "scaled_dot_product_attention"}
    assert all(row.macs and not row.weights for row in floats)
    with torch.no_grad():
        expected, actual = model(**call), result.quantized()(**call)
    assert type(actual) is type(expected)
    assert FLOORS_DB[recipe] - 2 < decibels(expected.logits, actual.logits) < 90


def test_ties_of_transformers() -> None:
    result = quantize_layers(gpt2(), kwargs={"input_ids": tokens()}, recipe="int8_dynamic").quantized()
    assert result.lm_head.stored("weight")[0] is result.transformer.wte.stored("weight")[0]
    call = {"input_ids": tokens(), "decoder_input_ids": tokens(length=5)}
    result = quantize_layers(t5(tied=True), kwargs=call, recipe="int8_dynamic").quantized()
    users = (result.shared, result.encoder.embed_tokens, result.decoder.embed_tokens, result.lm_head)
    assert len({id(user.stored("weight")[0]) for user in users}) == 1
