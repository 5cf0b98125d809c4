"""Weights that a module's own code multiplies by, experts above all, and operators of other libraries."""

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
from lightning_quant.planned.layerwise import quantize_layers

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


class Einsum(nn.Module):
    """All experts on every token, mixed by a layer inside the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 16))
        self.up = nn.Parameter(torch.randn(4, 16, 32) / 4)
        self.gate = nn.Linear(16, 4)
        self.down = nn.Parameter(torch.randn(4, 32, 16) / 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("btd,edf->btef", x * self.gain, self.up))
        experts = torch.einsum("btef,efd->bted", hidden, self.down)
        return (experts * self.gate(x).softmax(-1).unsqueeze(-1)).sum(2)


class Gathered(nn.Module):
    """One expert for each token, its weight gathered, as Llama 4 and batched kernels have it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 4)
        self.weight = nn.Parameter(torch.randn(4, 16, 32))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = self.mix(rows).argmax(-1)
        return torch.bmm(rows.unsqueeze(1), self.weight[chosen]).view(*x.shape[:2], -1)


class Grouped(nn.Module):
    """Rows sorted by expert and multiplied in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 3)
        self.experts = nn.Parameter(torch.randn(3, 24, 16))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen, order = self.mix(rows).argmax(-1).sort()
        ends = F.one_hot(chosen, 3).sum(0).cumsum(0).to(torch.int32)
        y = F.grouped_mm(rows[order], self.experts.transpose(1, 2), offs=ends)
        return y[order.argsort()].view(*x.shape[:2], -1)


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.positions = nn.Parameter(torch.randn(16, 64)), nn.Parameter(torch.randn(1, 64, 16))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.positions[:, : x.shape[1]]) @ self.weight


class Standardized(nn.Module):
    """Computes its kernel from a parameter at each call, without a layer of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.gain = nn.Parameter(torch.randn(16, 6, 3, 5)), nn.Parameter(torch.ones(16, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        kernel = (self.kernel - self.kernel.mean((1, 2, 3), keepdim=True)) * self.gain
        return F.conv2d(x.unsqueeze(2).expand(-1, -1, 3, -1), kernel / 9)


class Dropped(nn.Module):
    """Sets a weight of the layer inside it from its own parameter at each call, as fastai's weight drop does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(16, 32, batch_first=True)
        weight = self.layer._parameters.pop("weight_hh_l0")
        assert weight is not None
        self.weight_hh_l0_raw = nn.Parameter(weight.detach())
        self.layer.weight_hh_l0 = weight.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight_hh_l0 = F.dropout(self.weight_hh_l0_raw, 0.5, self.training).clone()
        return self.layer(x)[0]


class Net(nn.Module):
    def __init__(self, inner: type[nn.Module] = Einsum) -> None:
        super().__init__()
        self.inner = inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 6, 16)


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        (Einsum, "torch"),
        (Einsum, "onnxruntime"),
        (Gathered, "torch"),
        (Grouped, "torch"),
        (Grouped, "onnxruntime"),
        (Projection, "torch"),
        (Standardized, "torch"),
        (Dropped, "torch"),
    ],
)
def test_weights_of_own_code_are_stored_small(kind: type[nn.Module], runtime: str, x: Tensor, tmp_path: Path) -> None:
    model = Net(kind).eval()
    before = list(model.named_parameters())
    artifact = quantize(model, "int8_weight_only", runtime, calibration_data=[x], output_dir=tmp_path)
    rows = {row["name"]: row for row in artifact.plan["rows"]}

    assert rows["inner"]["action"] == "int8 weights"
    assert [row for row in rows.values() if row["action"] == "float" and not row["reason"]] == []
    other = torch.randn(2, 6, 16)
    assert signal_to_noise(model(other), load(tmp_path)(other)) > 30
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(name, id(p)) for name, p in before]
    assert type(model.inner) is kind


def test_layers_beside_such_weights_keep_their_own_scheme(x: Tensor) -> None:
    quantized = quantize_layers(Einsum().eval(), (x,), recipe="int8_dynamic", runtime="torch")
    rows = {row.name: row for row in quantized.plan.rows}

    assert rows["gate"].action == "int8 dynamic"
    assert rows["Einsum"].action == "int8 weights"
    assert "in float" in rows["Einsum"].reason
    assert rows["gain"].reason
    assert rows["Einsum"].weights == 2 * 4 * 16 * 32


def test_tables_that_are_only_added_stay_float_and_have_a_row(x: Tensor) -> None:
    rows = {row.name: row for row in quantize_layers(Net(Projection).eval(), (x,), recipe="int8_weight_only").plan.rows}
    assert rows["inner.positions"].action == "float"
    assert rows["inner.positions"].weights == 64 * 16


def test_filled_model_reads_stored_weights(x: Tensor, tmp_path: Path) -> None:
    model = Net().eval()
    quantize(model, "int8_weight_only", "torch", calibration_data=[x], output_dir=tmp_path)
    filled = load(tmp_path, into=Net())
    expected = load(tmp_path)(x)

    torch.testing.assert_close(filled(x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(filled.inner, Einsum)
    assert filled.inner.up.shape == model.inner.up.shape
    for copied in (copy.deepcopy(filled), pickle.loads(pickle.dumps(filled))):
        assert torch.equal(copied(x), filled(x))


def test_experts_of_transformers(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    model = MixtralForCausalLM(config).eval()
    call = {"input_ids": torch.randint(64, (2, 8)), "use_cache": False}
    artifact = quantize(model, "int8_weight_only", "torch", calibration_data=[call], output_dir=tmp_path)
    other = {"input_ids": torch.randint(64, (3, 5)), "use_cache": False}

    assert artifact.report is not None
    assert artifact.report["size_ratio"] < 0.4
    assert signal_to_noise(model(**other).logits, load(tmp_path)(**other).logits) > 25
