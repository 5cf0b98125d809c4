"""Packed sequences and other forms of recurrence, exported and run at lengths that were never captured."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_quant import load, quantize
from lightning_quant.numerics.noise import signal_to_noise

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]


class Reader(nn.Module):
    """A recurrence over packed sequences."""

    def __init__(self, kind: str, *, batch_first: bool, enforce_sorted: bool, whole: bool, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 24, padding_idx=0)
        self.rnn = getattr(nn, kind)(24, 32, batch_first=batch_first, **options)
        self.label = nn.Linear((self.rnn.proj_size or 32) * (1 + self.rnn.bidirectional), 3)
        self.batch_first, self.enforce_sorted, self.whole = batch_first, enforce_sorted, whole

    def forward(self, tokens: Tensor, lengths: Tensor, *state: Tensor) -> Any:
        x = self.words(tokens)
        options = {"batch_first": self.batch_first}
        packed = pack_padded_sequence(
            x if self.batch_first else x.transpose(0, 1), lengths, enforce_sorted=self.enforce_sorted, **options
        )
        packed = PackedSequence(torch.tanh(packed.data), packed.batch_sizes, *packed[2:])
        output, last = self.rnn(packed, *state)
        total = tokens.shape[1] if self.whole else None
        padded, ends = pad_packed_sequence(output, padding_value=-1.0, total_length=total, **options)
        return self.label(padded), ends, last


FORMS = {
    "lstm": {"kind": "LSTM", "batch_first": True, "enforce_sorted": False, "whole": False, "bidirectional": True},
    "gru": {"kind": "GRU", "batch_first": False, "enforce_sorted": True, "whole": True, "num_layers": 2},
    "projected": {"kind": "LSTM", "batch_first": True, "enforce_sorted": False, "whole": True, "proj_size": 16},
}


def calls(sorted_: bool) -> list[tuple[Tensor, Tensor]]:
    made = []
    for lengths in ([7, 5, 4, 2], [5, 3, 1], [6, 6, 5, 2, 1]):
        order = lengths if sorted_ else lengths[1:] + lengths[:1]
        # The last call is shorter than what it is padded to.
        made.append((torch.randint(1, 60, (len(order), lengths[0] + (len(lengths) > 4))), torch.tensor(order)))
    return made


@pytest.mark.parametrize(
    ("name", "recipe", "runtime"),
    [
        *((name, "int8_dynamic", runtime) for name in FORMS for runtime in ("torch", "onnxruntime")),
        ("lstm", "int8", "torch"),
        ("lstm", "float16", "torch"),
        ("gru", "int4_weight_only", "torch"),
    ],
)
def test_packed_sequences(name: str, recipe: str, runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = FORMS[name]
    model = Reader(**options).eval()  # type: ignore[arg-type]
    *captured, other = calls(bool(options["enforce_sorted"]))
    artifact = quantize(model, recipe, runtime, calibration_data=captured, output_dir=tmp_path)

    assert all(row["reason"] for row in artifact.plan["rows"] if row["action"] == "float")
    assert signal_to_noise(model(*other), load(tmp_path)(*other)) > (
        30 if "4" not in recipe and recipe != "int8" else 18
    )
    if runtime == "torch" and recipe != "int8":
        filled = load(tmp_path, into=Reader(**options))  # type: ignore[arg-type]
        assert signal_to_noise(load(tmp_path)(*other), filled(*other)) > 60


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_states_of_packed_sequences_keep_their_order(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Reader(kind, batch_first=True, enforce_sorted=False, whole=True).eval()
    if kind == "LSTM":

        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = model

            def forward(self, tokens: Tensor, lengths: Tensor, hidden: Tensor, cell: Tensor) -> Any:
                return self.inner(tokens, lengths, (hidden, cell))

        net: nn.Module = Both().eval()
    else:
        net = model
    made = [(*call, *(torch.randn(1, len(call[1]), 32) for _ in range(1 + (kind == "LSTM")))) for call in calls(False)]
    quantize(net, "int8_weight_only", "torch", calibration_data=made[:2], output_dir=tmp_path)
    assert signal_to_noise(net(*made[2]), load(tmp_path)(*made[2])) > 30


def test_lengths_that_no_sequence_has_are_refused(tmp_path: Path) -> None:
    from lightning_quant.errors import QuantizationError

    model = Reader("GRU", batch_first=True, enforce_sorted=False, whole=True).eval()
    tokens, lengths = calls(False)[0]
    quantize(model, "int8_weight_only", "torch", calibration_data=[(tokens, lengths)], output_dir=tmp_path)
    with pytest.raises(QuantizationError):
        load(tmp_path)(tokens, lengths + 9)


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(12, 32, 2, batch_first=True, proj_size=8, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_projected_states_at_other_lengths(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Projected().eval()
    captured = [torch.randn(4, 6, 12), torch.randn(3, 9, 12)]
    artifact = quantize(model, "int8_weight_only", runtime, calibration_data=captured, output_dir=tmp_path)
    x = torch.randn(2, 13, 12)
    assert artifact.plan["stored_share"] == 1.0
    assert signal_to_noise(model(x), load(tmp_path)(x)) > 30


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.label = nn.LSTMCell(6, 16), nn.Linear(16, 3)

    def forward(self, frames: Tensor) -> Tensor:
        h = c = frames.new_zeros(frames.shape[0], 16)
        for t in range(frames.shape[1]):
            h, c = self.cell(frames[:, t], (h, c))
        return self.label(h)


def test_a_loop_over_time_keeps_the_captured_length_and_says_so(tmp_path: Path) -> None:
    model = Loop().eval()
    captured = [torch.randn(4, 5, 6), torch.randn(4, 7, 6)]
    artifact = quantize(model, "int8_weight_only", "torch", calibration_data=captured, output_dir=tmp_path)
    x = torch.randn(9, 5, 6)
    assert signal_to_noise(model(x), load(tmp_path)(x)) > 30
    assert artifact.report is not None
    assert "dimension 1 of `frames` is 5" in str(artifact.report)
