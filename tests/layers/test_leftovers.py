"""Layers that graphs leave in float and recipes of layers can store, and their rows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.export.prepare import prepare
from lightning_quant.graph.candidates import UNKNOWN_SHAPES
from lightning_quant.graph.plan import UNREAD, GraphPlan, Plan, Row
from lightning_quant.graph.table import Selection
from lightning_quant.layers.leftovers import left_in_float, with_stored
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.recipe.recipe import Recipe


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.unread = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Embedding(8, 4)
        self.kept, self.gain = nn.LSTM(4, 4), nn.LayerNorm(4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gain(self.kept(self.linear(self.table(tokens)))[0])


def plan_of(*rows: Row) -> Plan:
    return Plan("int8", "torch", "", (GraphPlan("", (), ()),), rows)


def test_what_has_a_stored_form_and_nobody_refused_is_left() -> None:
    rows = (
        Row("table", "Embedding", "float", "no form"),
        # Why a linear layer stays float says the runtime's table.
        Row("linear", "Linear", "float", "no integer kernel"),
        Row("unread", "Embedding", "float", UNREAD),
        Row("kept", "LSTM", "float", "excluded by name", excluded=True),
        Row("gain", "LayerNorm", "float", "no form"),
    )
    assert left_in_float(Net(), plan_of(*rows)) == {"table"}
    # As the experts of a mixture, each of which reads the rows that `nonzero` found.
    assert left_in_float(Net(), plan_of(Row("linear", "Linear", "float", UNKNOWN_SHAPES))) == {"linear"}


def test_rows_of_stored_layers_take_the_place_of_float_ones_and_keep_their_multiply_adds() -> None:
    plan = plan_of(Row("table", "Embedding", "float", "no form", macs=7), Row("linear", "Linear", "int8", macs=5))
    stored = {
        "table": Row("table", "Embedding", "int8 weights", "", macs=1),
        "linear": Row("linear", "Linear", "int8 weights", ""),
        "kept": Row("kept", "LSTM", "int8 weights", ""),
    }
    rows = {row.name: row for row in with_stored(Net(), plan, stored).rows}

    assert (rows["table"].action, rows["table"].macs) == ("int8 weights", 7)
    assert rows["linear"].action == "int8"
    assert rows["kept"].action == "int8 weights"
    assert torch.is_tensor(Net()(torch.arange(3)))


class Wrapped(nn.LSTM):
    """Its forward does more around that of PyTorch's layer."""

    def __init__(self) -> None:
        super().__init__(32, 32, batch_first=True)
        self.before = nn.Linear(32, 32)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return super().forward(self.before(x), state)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 3)
        self.up, self.down = (nn.Parameter(torch.randn(3, 32, 32) / 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1).permute(0, 2, 1).unsqueeze(-1)
        y = torch.relu(torch.einsum("bti,eio->beto", x, self.up))
        return (torch.einsum("beto,eoi->beti", y, self.down) * shares).sum(1)


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x[:, 1], self.cell(x[:, 0]))


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.head(y[0] if isinstance(y, tuple) else y)


@pytest.mark.parametrize(
    ("inner", "pattern", "by"),
    [
        (Wrapped, "inner.before", "exclude"),
        (Wrapped, "inner.before", "overrides"),
        (Loop, "inner.cell#1", "exclude"),
        (Experts, "inner.linear", "exclude"),
    ],
)
def test_what_is_stored_together_with_what_is_excluded_stays_float(inner: Any, pattern: str, by: str) -> None:
    torch.manual_seed(0)
    net, x = Around(inner()).eval(), torch.randn(2, 2, 32)
    chosen: dict[str, Any] = {"selection": Selection(exclude=(pattern,))} if by == "exclude" else {}
    recipe = Recipe(overrides={pattern: "float"} if by == "overrides" else {})
    before = prepare(net, (x,), trains=False)
    kept = prepare(net, (x,), recipe=recipe, trains=False, **chosen)
    rows = {row.name: row for row in kept.plan.rows}

    assert before.stored_layers()
    assert not kept.stored_layers()
    assert rows["head"].action == "int8"
    assert all(row.action != "int8 weights" for row in rows.values())
    assert any("is excluded, and is stored together with it" in row.reason for row in rows.values() if row.excluded)


def test_recipes_of_layers_keep_a_layer_that_holds_what_is_excluded() -> None:
    net, x = Around(Wrapped()).eval(), torch.randn(2, 2, 32)
    chosen = Selection(exclude=("inner.before",))
    rows = quantize_layers(net, (x,), {}, recipe="int8_weight_only", runtime="torch", selection=chosen).plan.rows
    (inner,) = (row for row in rows if row.name == "inner")

    assert inner.excluded
    assert inner.reason == "inner.before is excluded, and is stored together with it"
