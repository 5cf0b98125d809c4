"""One contract for every recipe of layers on every runtime that has one, over one net with a layer of each kind."""

from pathlib import Path

import pytest
import torch
from layer_models import LAYER_RECIPES, VOCABULARY, tokens
from lightning_models import decibels, equal_tensors, tensors_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_quant import load, verify
from lightning_quant.export.export import export
from lightning_quant.planned.layerwise import quantize_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]
RUNTIMES = ("onnxruntime", "torch")


class OfEachKind(nn.Module):
    """Answers with what every layer makes of the same embedded tokens, each on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.linear, self.without_bias = nn.Linear(32, 16), nn.Linear(32, 16, bias=False)
        self.conv1d_of_gpt2 = Conv1D(16, 32)
        self.conv1d, self.conv_transpose1d = nn.Conv1d(32, 8, 3, padding=1), nn.ConvTranspose1d(32, 8, 2, stride=2)
        self.conv2d = nn.Conv2d(1, 4, 3, stride=2)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.lstm = nn.LSTM(32, 8, 2, bidirectional=True, batch_first=True)
        self.gru, self.rnn = nn.GRU(32, 8, batch_first=True, bias=False), nn.RNN(32, 8, nonlinearity="relu")
        self.lstm_cell, self.gru_cell, self.rnn_cell = nn.LSTMCell(32, 8), nn.GRUCell(32, 8), nn.RNNCell(32, 8)
        self.head = nn.Linear(32, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.embedding(tokens)
        columns, first = x.transpose(1, 2), x[:, 0]
        lstm, (_, cell) = self.lstm(x)
        return {
            "embedding": x,
            "linear": self.linear(x),
            "without_bias": self.without_bias(x),
            "conv1d_of_gpt2": self.conv1d_of_gpt2(x),
            "conv1d": self.conv1d(columns),
            "conv_transpose1d": self.conv_transpose1d(columns),
            "conv2d": self.conv2d(x.unsqueeze(1)),
            "attention": self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0],
            "encoder": self.encoder(x),
            "lstm": lstm,
            "cell_state": cell,
            "gru": self.gru(x)[0],
            "rnn": self.rnn(x.transpose(0, 1))[1],
            "lstm_cell": self.lstm_cell(first)[1],
            "gru_cell": self.gru_cell(first),
            "rnn_cell": self.rnn_cell(first),
            "head": self.head(x),
        }


def call(batch: int, length: int) -> dict[str, Tensor]:
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[-1, length // 2 :] = True
    return {"tokens": tokens(batch, length), "mask": mask}


FLOORS_DB = {"int8_dynamic": 28, "int8_weight_only": 28, "int4_weight_only": 12, "float16": 45, "bfloat16": 30}
FLOORS_DB |= {f"{name}_gptq": FLOORS_DB[name] for name in ("int8_weight_only", "int4_weight_only")}


# Exporting to ONNX takes longest: two recipes show all of its operators.
_OF_EVERY_RUN = {"int8_dynamic", "int4_weight_only"}
_EVERY_PAIR = [
    pytest.param(recipe, runtime, marks=[] if runtime == "torch" or recipe in _OF_EVERY_RUN else pytest.mark.slow)
    for runtime in RUNTIMES
    for recipe in LAYER_RECIPES
]


@pytest.mark.parametrize(("recipe", "runtime"), _EVERY_PAIR)
def test_contract(recipe: str, runtime: str, tmp_path: Path) -> None:
    model = OfEachKind()
    model.train()
    before, flags = tensors_of(model), [module.training for module in model.modules()]
    quantized = quantize_layers(model, kwargs=call(2, 6), recipe=recipe, runtime=runtime)
    artifact = export(quantized, tmp_path)

    assert equal_tensors(tensors_of(model), before)
    assert [module.training for module in model.modules()] == flags
    assert (artifact.manifest["recipe"], artifact.manifest["runtime"]) == (recipe, runtime)
    rows = artifact.plan["rows"]
    actions = {row["action"] for row in rows if row["weights"]}
    assert actions <= {"int8 dynamic", "int8 weights", "int4 weights", "float16", "bfloat16"}
    assert artifact.plan["stored_share"] == 1.0
    assert [row["weights"] for row in rows if row["name"] in ("embedding", "head")] == [VOCABULARY * 32, 0]
    assert artifact.size_bytes == sum((tmp_path / name).stat().st_size for name in artifact.model_files.values())
    loaded = load(tmp_path)
    # A Trainer sets the mode of all modules around validation.
    loaded.train().eval()
    assert not quantized.parity(loaded, artifact.model_path).failures
    for batch, length in ((2, 6), (1, 9), (4, 3)):
        given = call(batch, length)
        with torch.no_grad():
            expected, actual = model.eval()(**given), loaded(**given)
        assert list(actual) == list(expected)
        for name in expected:
            assert actual[name].shape == expected[name].shape, name
            assert FLOORS_DB[recipe] < decibels(expected[name], actual[name]) < 100, name
    assert not verify(tmp_path).failures
