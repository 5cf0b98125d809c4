"""Recurrent layers in every scheme against the float layer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_models import Around, Packed, with_rounded_weights
from lightning_models import decibels
from stored_layers import DYNAMIC, WEIGHT_ONLY, check, quantized
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lightning_quant as lq

pytestmark = [
    # PyTorch's advice on the encoder's fused kernels and on weight normalization.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
]


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
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(result.quantized())(x, lengths), expected)


def test_recurrence_keeps_no_float_weights() -> None:
    layer = quantized(Around(nn.LSTM(16, 8)), torch.randn(4, 16)).layers["layer"]
    with torch.no_grad():
        layer(torch.randn(4, 16))
    held = [t for t in vars(layer._float_layer).get("_flat_weights", []) if isinstance(t, Tensor)]
    assert all(tensor.is_meta for tensor in (*held, *layer._float_layer.parameters()))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_projected_state() -> None:
    check(nn.LSTM(16, 8, 2, proj_size=4, bidirectional=True), torch.randn(4, 3, 16), scheme=WEIGHT_ONLY)


class Streaming(nn.Module):
    """A projected LSTM both ways over packed sequences that goes on from a state."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = nn.LSTM(16, 32, 2, proj_size=8, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor, lengths: Tensor) -> list[Tensor]:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed, state = self.reads(packed, (hidden, cell))
        return [nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0], *state]


@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.slow
def test_a_projected_state_that_is_passed_in_is_exported(tmp_path: Path) -> None:
    """As many layers and directions as samples: states that do not fit are tried on the way, and end no process."""
    model = Streaming().eval()
    call = torch.randn(4, 7, 16), torch.randn(4, 4, 8), torch.randn(4, 4, 32), torch.tensor([7, 5, 6, 2])
    artifact = lq.quantize(model, "int8_weight_only", calibration_data=[call], output_dir=tmp_path)
    loaded = lq.load(artifact, threads=1)
    fewer = call[0][:2], call[1][:, :2], call[2][:, :2], call[3][:2]
    with torch.no_grad():
        assert all(decibels(a, b) > 35 for c in (call, fewer) for a, b in zip(model(*c), loaded(*c), strict=True))


class Captions(nn.Module):
    """A bidirectional recurrence over sequences of any length, with layers before and behind it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(16, 48, 3, padding=1), nn.Linear(48, 6)
        self.rnn = getattr(nn, kind)(48, 24, 2, batch_first=True, bidirectional=True)
        parametrizations.weight_norm(self.rnn, "weight_hh_l0")

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(self.conv(x).transpose(1, 2))
        return self.head(h.mean(1))


@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
@pytest.mark.parametrize(
    ("recipe", "runtime", "kind"),
    [
        ("int8_dynamic", "onnxruntime", "GRU"),
        *(
            pytest.param(recipe, runtime, kind, marks=pytest.mark.slow)
            for recipe, runtime in (
                ("int8", "onnxruntime"), ("float16", "onnxruntime"), ("int8", "torch"), ("int8_weight_only", "torch"),
                ("int8", "openvino"), ("int8_weight_only", "openvino"),
            )
            for kind in ("LSTM", "GRU", "RNN")
        ),
    ],
)  # fmt: skip
def test_recurrences_that_stay_float_take_any_length(recipe: str, runtime: str, kind: str, tmp_path: Path) -> None:
    model = Captions(kind).eval()
    calls = [torch.randn(4, 16, 30), torch.randn(6, 16, 41)]
    artifact = lq.quantize(model, recipe, runtime, calibration_data=calls, exclude=["rnn"], output_dir=tmp_path)
    longer = torch.randn(3, 16, 77)
    with torch.no_grad():
        assert decibels(model(longer), lq.load(artifact, threads=1)(longer)) > 30
    assert not [note for note in artifact.report["notes"] if "peer" in note]


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


def test_weight_norm_of_a_recurrent_layer_is_not_dropped() -> None:
    layer = nn.GRU(16, 8)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    layer.parametrizations.weight_hh_l0.original0.data *= 3
    x = torch.randn(4, 3, 16)
    with torch.no_grad():
        expected = layer(x)[0]
        assert decibels(expected, quantized(Around(layer), x).quantized()(x)[0]) > 30


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm = nn.Linear(6, 8), nn.LSTM(8, 8, batch_first=True, proj_size=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.first(x))[0]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_a_float_projection_is_kept_by_files(tmp_path: Path) -> None:
    """PyTorch's exporter to ONNX writes an LSTM without its projection, whose states do not fit then."""
    torch.manual_seed(0)
    model = Projected()
    calls = [torch.randn(4, 5, 6) for _ in range(3)]
    artifact = lq.quantize(
        model, "int8", calibration_data=calls, exclude=["lstm"], output_dir=tmp_path / "artifact", threads=1
    )

    assert all(row["runtime_float"] for row in artifact.report["latency"])
    with torch.no_grad():
        assert decibels(model(calls[0]), lq.load(artifact.path, threads=1)(calls[0])) > 40
