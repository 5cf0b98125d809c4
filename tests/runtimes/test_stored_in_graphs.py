"""Static int8 of nets whose layers have no integer kernels, or hide their products from a trace."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant import load, quantize
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection
from lightning_quant.numerics.noise import signal_to_noise

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage.*:UserWarning"),
]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(12, 64)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 1)
        self.label = nn.Linear(64, 4)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.label(self.body(self.lift(x), src_key_padding_mask=padding)[:, 0])


class Attending(nn.Module):
    """Batch second, weights wanted, a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, x, x, attn_mask=mask)


class Tables(nn.Module):
    """Tables, bags, recurrences and a cell in front of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bag = nn.Embedding(200, 64), nn.EmbeddingBag(200, 64, mode="mean", padding_idx=0)
        self.lstm = nn.LSTM(64, 48, 2, batch_first=True, bidirectional=True)
        self.gru, self.cell = nn.GRU(96, 64, batch_first=True), nn.GRUCell(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.gru(self.lstm(self.table(tokens))[0])
        return self.head(self.cell(self.bag(tokens), y[:, -1]))


class Flat(nn.Module):
    """Bags of one long list of indices."""

    def __init__(self, mode: str, padding: int | None) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(100, 16, mode=mode, padding_idx=padding), nn.Linear(16, 3)

    def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bag(indices, offsets))


PADDING = torch.arange(6)[None] >= torch.tensor([6, 4, 3, 5])[:, None]
NETS: dict[str, tuple[type[nn.Module], tuple[Tensor, ...]]] = {
    "encoder": (Encoder, (torch.randn(4, 6, 12), PADDING)),
    "attention": (Attending, (torch.randn(6, 4, 32), torch.ones(6, 6, dtype=torch.bool).triu(1))),
    "tables": (Tables, (torch.randint(0, 200, (4, 7)),)),
}


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
@pytest.mark.parametrize("name", NETS)
def test_files_are_small_and_near_to_float(name: str, runtime: str, tmp_path: Path) -> None:
    kind, call = NETS[name]
    torch.manual_seed(0)
    model = kind().eval()
    artifact = quantize(model, "int8", runtime, calibration_data=[call, call], output_dir=tmp_path)
    rows = artifact.plan["rows"]

    assert artifact.plan["weight_coverage"] == 1.0, rows
    assert all(row["reason"] for row in rows if row["action"] == "float")
    # Of a net this small a graph is a good part.
    assert artifact.size_bytes < 0.3 * sum(4 * p.numel() for p in model.parameters()) + 40_000
    assert signal_to_noise(model(*call), load(tmp_path)(*call)) > 25


def test_excluded_layers_stay_float() -> None:
    kind, call = NETS["tables"]
    plan = prepare(kind().eval(), call, selection=Selection(exclude=("lstm", "Embedding"))).plan
    actions = {row.name: row.action for row in plan.rows if row.weights}
    assert actions == {
        **dict.fromkeys(("table", "lstm"), "float"),
        **dict.fromkeys(("bag", "gru", "cell"), "int8 weights"),
        "head": "int8",
    }


@pytest.mark.parametrize(("mode", "padding"), [("sum", None), ("mean", 0), ("max", 3)])
def test_bags_of_flat_indices(mode: str, padding: int | None, tmp_path: Path) -> None:
    model, call = Flat(mode, padding).eval(), (torch.randint(0, 100, (9,)), torch.tensor([0, 4, 4]))
    quantize(model, "int8_weight_only", "torch", calibration_data=[call], output_dir=tmp_path)
    assert signal_to_noise(model(*call), load(tmp_path)(*call)) > 30


@pytest.mark.parametrize(
    "build", [lambda: nn.Transformer(32, 4, 1, 1, 64), lambda: nn.MultiheadAttention(32, 4, add_bias_kv=True)]
)
def test_plans_of_other_forms(build: Any) -> None:
    module = build()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = module, nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x, x) if isinstance(module, nn.Transformer) else self.inner(x, x, x)[0]
            return self.last(y)

    plan = prepare(Net().eval(), (torch.randn(5, 4, 32),)).plan
    assert plan.weight_coverage == 1.0
    assert all(row.reason for row in plan.rows if row.action == "float")


def test_masks_that_hide_nothing_are_planned_as_exporters_see_them(tmp_path: Path) -> None:
    """Transformers leave such a mask out when it looks at values, and exporters cannot look."""
    from layer_models import bert

    model = bert()
    call = {"input_ids": torch.randint(96, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    artifact = quantize(model, "int8", "torch", calibration_data=[call], output_dir=tmp_path)
    assert artifact.plan["weight_coverage"] == 1.0
    other = {**call, "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3])}
    assert signal_to_noise(model(**other).logits, load(tmp_path)(**other).logits) > 20


def test_transposed_layers_of_transformers_run_in_integers() -> None:
    from layer_models import gpt2

    plan = prepare(gpt2(), kwargs={"input_ids": torch.randint(96, (2, 6)), "use_cache": False}).plan
    assert {row.action for row in plan.rows if row.kind == "Conv1D"} == {"int8"}
    assert plan.weight_coverage == 1.0


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def upsampling() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(8, 24, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(24, 4, 4, 2, 1))


ALONE = {
    "LSTM": (Recurrent, torch.randn(4, 10, 16)),
    "transposed convolutions": (upsampling, torch.randn(4, 8, 6, 6)),
}


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        *((name, runtime) for name in ALONE for runtime in ("onnxruntime", "torch")),
        ("transposed convolutions", "openvino"),
    ],
)
def test_nets_without_integer_kernels_are_stored_small(name: str, runtime: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, x = ALONE[name]
    model = make().eval()
    artifact = quantize(model, "int8", runtime, calibration_data=[x], output_dir=tmp_path)
    report = artifact.report

    assert report["plan"]["weight_coverage"] == 1.0
    assert report["plan"]["coverage"] == 0.0
    assert not any("parity" in warning for warning in report["warnings"])
    with torch.no_grad():
        assert signal_to_noise(model(x), load(artifact.path)(x)) > 40


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_weights_that_are_made_of_others_are_those_of_their_layer(norm: str) -> None:
    made = getattr(torch.nn.utils.parametrizations, norm)
    up = made(nn.ConvTranspose1d(8, 4, 4, 2, 1))
    model = nn.Sequential(made(nn.Conv1d(4, 8, 3)), nn.ReLU(), up, nn.Conv1d(4, 4, 3))
    plan = prepare(model.eval(), (torch.randn(2, 4, 16),)).plan

    assert [row.action for row in plan.rows][:4] == ["int8", "fused", "int8 weights", "int8"]
    assert plan.weight_coverage == 1.0


class Own(nn.Module):
    """Multiplies by weights of its own beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv1d(4, 8, 3), nn.Parameter(torch.randn(8, 8, 100))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean(2)
        return torch.einsum("bi,bj,ijk->bk", x, x, self.mix)


@pytest.mark.parametrize("build", [Own, lambda: nn.Sequential(Own())], ids=["root", "child"])
def test_weights_of_own_code_are_counted_once(build: Any) -> None:
    plan = prepare(build().eval(), (torch.randn(2, 4, 16),)).plan

    assert sum(row.weights for row in plan.rows) == 4 * 8 * 3 + 8 * 8 * 100
    assert [row.action for row in plan.rows if row.weights] == ["int8", "int8 weights"]
    assert sum(row.macs for row in plan.rows) == sum(row.macs for row in plan.rows if row.kind in ("Conv1d", "einsum"))
