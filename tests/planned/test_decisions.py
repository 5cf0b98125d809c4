"""Modules that look into tensors export as they decide in the captured call, and no other call gets an answer."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

import lightning_quant as lq
from lightning_quant.errors import ExportError, FixedSizesError
from lightning_quant.planned.decisions import decided_as_captured, decisions

_RUNTIMES = [("int8", "onnxruntime"), ("int8_weight_only", "torch")]


class _Reading(nn.Module):
    """Cuts sequences to the longest, and goes another way for short ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        assert lengths.min() > 0
        y = torch.relu(self.first(x[:, : int(lengths.max())]))
        if (lengths == 2).any():
            y = y * 100
        return self.second(y)


class _Packing(nn.Module):
    """Packs sequences for a recurrence, and pads what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)
        self.rnn = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(self.first(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, (state, _) = self.rnn(packed)
        if lengths.min() < 3:
            output, (state, _) = self.rnn(packed, (state, state))
        padded, _ = rnn.pad_packed_sequence(output, batch_first=True)
        return self.second(padded) + state[-1][:, None, :3]


def _call(number: int, length: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(number, 5, 6, generator=torch.Generator().manual_seed(number)), torch.full((number,), length)


@pytest.mark.filterwarnings("ignore:.*multiply-adds.*", "ignore:.*percent of.*")
@pytest.mark.parametrize(("recipe", "runtime"), _RUNTIMES)
@pytest.mark.parametrize("kind", [_Reading, _Packing])
def test_calls_that_decide_alike_are_answered_and_others_refused(
    kind: type[nn.Module], recipe: str, runtime: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    artifact = lq.quantize(model, recipe, runtime, calibration_data=[_call(8)], output_dir=tmp_path, threads=1)

    loaded = lq.load(artifact.path)
    assert any("answers calls alone in which" in note for note in artifact.report["notes"])
    with torch.no_grad():
        for number in (1, 4, 11):
            torch.testing.assert_close(loaded(*_call(number)), model(*_call(number)), rtol=0.0, atol=0.3)
        with pytest.raises(FixedSizesError, match=r"Expected a call in which `.*lengths.*` reads (5|False)"):
            loaded(*_call(4, length=2))
    assert "forward" not in vars(model)


def test_what_reads_other_numbers_is_refused(tmp_path: Path) -> None:
    class Scaling(_Reading):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.second(self.first(x)) * float(x.max())

    with pytest.raises(ExportError, match="float"):
        lq.quantize(Scaling().eval(), "int8", "torch", calibration_data=[_call(8)], output_dir=tmp_path)


def test_a_call_that_decides_otherwise_gets_nan() -> None:
    model = _Reading().eval()
    with torch.no_grad():
        decided = decisions(model, _call(4), {})
        with decided_as_captured(model, decided):
            assert torch.isfinite(model(*_call(4))).all()
            assert model(*_call(4, length=2)).isnan().all()
        assert torch.isfinite(model(*_call(4, length=2))).all()
