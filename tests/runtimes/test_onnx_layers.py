"""Stored layers as ONNX files: operators, weights in the file, and answers of ONNX Runtime."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from layer_models import TokenClassifier, bert, gpt2, llama, rounded, t5, tokens
from lightning_models import decibels
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_quant import load, runtimes, verify
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.errors import QuantizationError
from lightning_quant.export.export import export
from lightning_quant.planned.layerwise import Layerwise, quantize_layers
from lightning_quant.recipe.recipe import LayerRecipe

runtime = runtimes.get("onnxruntime")


def save(model: nn.Module, call: dict[str, Any], folder: Path, recipe: Any) -> tuple[Layerwise, Artifact]:
    """Quantize a model and write the artifact, without measuring it."""
    quantized = quantize_layers(model.eval(), kwargs=call, recipe=recipe, runtime="onnxruntime")
    return quantized, export(quantized, folder)


def tensors_in(path: Path) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}


def operators_in(path: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Larger than what PyTorch's exporter computes beforehand.
        self.first, self.second = nn.Linear(64, 192), nn.Linear(192, 96, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_dynamic_rows_have_ranges_of_their_own(tmp_path: Path) -> None:
    model, x = Pair(), torch.randn(6, 64)
    artifact = save(model, {"x": x}, tmp_path, "int8_dynamic")[1]
    loaded = load(tmp_path)
    quiet = [0, 1, 3, 4, 5]
    loud = x.clone()
    loud[2] *= 1e6
    with torch.no_grad():
        expected = model(loud)
    assert decibels(expected[quiet], loaded(loud)[quiet]) > 30
    assert decibels(expected[2], loaded(loud)[2]) > 30
    assert torch.equal(loaded(x)[quiet], loaded(loud)[quiet])
    assert operators_in(artifact.model_path)["MatMulInteger"] == 2
    assert [a.dtype for a in tensors_in(artifact.model_path).values() if a.ndim == 2] == [np.int8, np.int8]


@pytest.mark.parametrize("value", [0.0, 5.0, 1e-30, 1e30])
def test_dynamic_rows_of_one_value(value: float, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    save(model, {"input": torch.randn(3, 64)}, tmp_path, "int8_dynamic")
    x = torch.full((3, 64), value)
    result = load(tmp_path)(x)
    assert result.isfinite().all()
    with torch.no_grad():
        assert decibels(model(x), result) > 30


class Chosen(nn.Module):
    """A layer of the rows that a router gives it, if any."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.where(x[:, 0] > 0)[0]
        return torch.zeros(len(x), 32).index_add_(0, rows, self.layer(x[rows]))


def test_dynamic_layers_may_get_no_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Chosen(), torch.randn(8, 64)
    _, artifact = save(net, {"x": x}, tmp_path / "artifact", "int8_dynamic")
    loaded = load(artifact.path)
    for call in (x, x[:3], x[:1]):
        assert decibels(net(call).detach(), loaded(call)) > 35
    assert torch.equal(loaded(-x.abs()), torch.zeros(8, 32))


def test_weight_only_is_the_product_with_the_rounded_weight(tmp_path: Path) -> None:
    model, x = Pair(), torch.randn(2, 5, 64)
    recipe = LayerRecipe("int8_weight_only", ("weight_only",), bias_correction=False)
    artifact = save(model, {"x": x}, tmp_path, recipe)[1]
    with torch.no_grad():
        model.first.weight.copy_(rounded(model.first.weight, "int8"))
        model.second.weight.copy_(rounded(model.second.weight, "int8"))
        torch.testing.assert_close(load(tmp_path)(x), model(x), rtol=1e-4, atol=1e-5)
    # What sessions make of DequantizeLinear and MatMul would round the activations.
    counts = runtime.count_operators(artifact.model_path)
    assert not {"MatMulInteger", "MatMulNBits", "MatMulIntegerToFloat"} & counts.keys()
    assert [a.dtype for a in tensors_in(artifact.model_path).values() if a.ndim == 2] == [np.int8, np.int8]


def test_four_bits_are_matmul_nbits(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 96)), torch.randn(5, 64)
    schemes = ("weight_only_4bit", "weight_only")
    recipe = LayerRecipe("int4_weight_only", schemes, floor_db=12.0, bias_correction=False)
    artifact = save(model, {"input": x}, tmp_path, recipe)[1]
    assert [row["action"] for row in artifact.plan["rows"]] == ["int4 weights", "int8 weights"]
    nodes = [node for node in onnx.load(artifact.model_path).graph.node if node.op_type == "MatMulNBits"]
    assert [{a.name: a.i for a in node.attribute} for node in nodes] == [
        {"K": 64, "N": 200, "bits": 4, "block_size": 32}
    ]
    with torch.no_grad():
        model[0].weight.copy_(rounded(model[0].weight, "int4"))
        model[2].weight.copy_(rounded(model[2].weight, "int8"))
        torch.testing.assert_close(load(tmp_path)(x), model(x), rtol=1e-4, atol=1e-5)
    # Half a byte for each value of the first layer, one for the second.
    held = sum(a.nbytes for a in tensors_in(artifact.model_path).values() if a.dtype in (np.int8, np.uint8))
    assert held == 64 * 200 // 2 + 200 * 96


@pytest.mark.parametrize("recipe", ["float16", "bfloat16"])
def test_half_precision_is_for_storage(recipe: str, tmp_path: Path) -> None:
    model, x = Pair(), torch.randn(5, 64)
    artifact = save(model, {"x": x}, tmp_path, recipe)[1]
    with torch.no_grad():
        model.first.weight.copy_(rounded(model.first.weight, recipe))
        model.second.weight.copy_(rounded(model.second.weight, recipe))
        torch.testing.assert_close(load(tmp_path)(x), model(x), rtol=1e-4, atol=1e-5)
    kinds = {i.data_type for i in onnx.load(artifact.model_path).graph.initializer if len(i.dims) == 2}
    assert kinds == {getattr(onnx.TensorProto, recipe.upper())}


def test_recurrent_layers_are_one_operator_each(tmp_path: Path) -> None:
    model = TokenClassifier(kind="GRU", layers=2)
    quantized, artifact = save(model, {"tokens": tokens()}, tmp_path, "int8_dynamic")
    assert operators_in(artifact.model_path)["GRU"] == 2
    with torch.no_grad():
        reference = quantized.quantized()(tokens(3, 11))
    torch.testing.assert_close(load(tmp_path)(tokens(3, 11)), reference, rtol=0.05, atol=0.02)


def transformers_models() -> list[Any]:
    heavy = pytest.mark.slow
    call = {"input_ids": tokens()}
    return [
        pytest.param(gpt2, call, id="gpt2"),
        pytest.param(bert, {**call, "attention_mask": torch.ones_like(tokens())}, id="bert", marks=heavy),
        pytest.param(llama, call, id="llama", marks=heavy),
        pytest.param(t5, {**call, "decoder_input_ids": tokens(length=5, seed=1)}, id="t5", marks=heavy),
    ]


@pytest.mark.parametrize(("make", "call"), transformers_models())
def test_models_of_transformers(make: Any, call: dict[str, Tensor], tmp_path: Path) -> None:
    model = make()
    quantized, artifact = save(model, call, tmp_path, "int8_dynamic")
    loaded = load(tmp_path)
    for batch, length in ((2, 7), (3, 12), (1, 3)):
        given = {
            name: tokens(batch, length) if name != "attention_mask" else torch.ones(batch, length).long()
            for name in call
        }
        with torch.no_grad():
            floating, reference = model(**given).logits, quantized.quantized()(**given).logits
            actual = loaded(**given).logits
        assert 25 < decibels(floating, actual) < 90
        assert decibels(reference, actual) > 25
    if make in (gpt2, bert):
        with pytest.raises(QuantizationError, match="such as sequences that it has positions for"):
            loaded(**{name: torch.ones(2, 40, dtype=torch.long) for name in call})
    if make is gpt2:
        with pytest.raises(QuantizationError, match="Expected the constants of the captured call"):
            loaded(**call, use_cache=False)
    assert not verify(tmp_path).failures
    large = [a for a in tensors_in(artifact.model_path).values() if a.ndim > 1 and a.size > 1024]
    assert {a.dtype for a in large} == {np.dtype(np.int8)}


def test_model_to_fill_is_refused(tmp_path: Path) -> None:
    model = Pair()
    save(model, {"x": torch.randn(3, 64)}, tmp_path, "int8_dynamic")
    with pytest.raises(QuantizationError, match="Quantize for runtime 'torch'"):
        load(tmp_path, into=model)
