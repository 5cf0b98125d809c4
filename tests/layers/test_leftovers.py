"""Layers that graphs leave in float and recipes of layers can store, and their rows."""

import torch
from torch import Tensor, nn

from lightning_quant.graph.candidates import UNKNOWN_SHAPES
from lightning_quant.graph.plan import UNREAD, GraphPlan, Plan, Row
from lightning_quant.layers.leftovers import left_in_float, with_stored


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
