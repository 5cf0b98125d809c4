"""Layers of classes that users derive, and code of models that looks at its layers."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant import load, quantize
from lightning_quant.numerics.noise import signal_to_noise

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


class ScaledEmbedding(nn.Embedding):
    """As in Gemma and BART."""

    def __init__(self, *sizes: int, scale: float) -> None:
        super().__init__(*sizes)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale


class ShiftedEmbedding(nn.Embedding):
    """As OPT's positions: not the rows that are asked for."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


class MaskedLinear(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("mask", (torch.rand(self.weight.shape) > 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class CausalConv1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class Scaled(nn.Module):
    """A scaled table with a tied head, positions and subclasses between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = ScaledEmbedding(50, 16, scale=4.0)
        self.positions = ShiftedEmbedding(20, 16)
        self.mix = CausalConv1d(16, 16, 3)
        self.up = MaskedLinear(16, 32)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        if isinstance(self.down, nn.Linear) and self.down.weight.dtype == torch.float32:
            x = x + self.down(F.relu(self.up(x)))
        return self.head(x)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(50, (2, 8))


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_subclasses_are_stored_small(runtime: str, ids: Tensor, tmp_path: Path) -> None:
    model = Scaled().eval()
    artifact = quantize(model, "int8_weight_only", runtime, calibration_data=[{"ids": ids}], output_dir=tmp_path)
    rows = {row["name"]: row for row in artifact.report["plan"]["rows"]}

    assert {row["action"] for row in rows.values()} == {"int8 weights"}, rows
    assert signal_to_noise(model(ids), load(tmp_path)(ids)) > 35


def test_filled_model_keeps_buffers_factors_and_ties(ids: Tensor, tmp_path: Path) -> None:
    model = Scaled().eval()
    quantize(model, "int8_weight_only", "torch", calibration_data=[{"ids": ids}], output_dir=tmp_path)
    filled = load(tmp_path, into=Scaled())
    expected = load(tmp_path)(ids)

    torch.testing.assert_close(filled(ids), expected, rtol=1e-5, atol=1e-5)
    for copied in (copy.deepcopy(filled), pickle.loads(pickle.dumps(filled))):
        assert torch.equal(copied(ids), filled(ids))
    assert isinstance(filled.up, MaskedLinear)
    assert filled.up.in_features == 16


class Part(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.__dict__.update(attributes)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Trend(Part):
    pass


class Asking(nn.Module):
    """Cannot be traced as a whole, and looks at its parts: class, attributes, length, type of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Trend(gain=2.0), Part(gain=0.5)])
        self.mlp = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        trend, rest = torch.zeros_like(x), self.mlp(x) * self.mlp[-1].out_features / len(self.mlp)
        for number in range(int(x.shape[1]) // 4):
            part = self.parts[number]
            if isinstance(part, Trend):
                trend = trend + part(x) * part.gain
            else:
                rest = rest + part(x) * part.gain
        assert sum(1 for _ in self.parts[0].children()) == 1
        return {"trend": trend, "rest": self.last(rest.to(self.last.weight.dtype))}


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch", "openvino"])
def test_converted_parts_keep_class_and_attributes(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    model, x = Asking().eval(), torch.randn(64, 8)
    artifact = quantize(model, "int8", runtime, calibration_data=[x], output_dir=tmp_path)
    output, expected = load(tmp_path)(x), model(x)

    assert min(signal_to_noise(expected[name], output[name]) for name in expected) > 30
    rows = artifact.report["plan"]["rows"]
    assert [row["name"] for row in rows if row["kind"] == "Linear" and row["action"] != "int8"] == []
