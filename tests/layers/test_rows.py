"""Every layer has a row with its multiply-adds and weights."""

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.graph.table import Selection
from lightning_quant.planned.layerwise import quantize_layers


def test_counts_of_multiply_adds_and_weights() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, groups=2), nn.Flatten(), nn.Linear(4 * 7 * 7, 5)
    )
    result = quantize_layers(model.eval(), (torch.randn(2, 3, 8, 8),), recipe="int8_weight_only")
    rows = {row.name: row for row in result.plan.rows}
    assert rows["0"].macs == 2 * 6 * 6 * 8 * 3 * 9
    assert rows["2"].macs == 2 * 6 * 6 * 8 * 2 * 4
    assert rows["4"].macs == 2 * 4 * 7 * 7 * 5
    assert [row.weights for row in result.plan.rows] == [8 * 27, 8 * 2 * 4, 4 * 49 * 5]
    assert result.plan.coverage == 1.0
    partial = quantize_layers(
        model, (torch.randn(2, 3, 8, 8),), recipe="int8_weight_only", selection=Selection(exclude=("0",))
    ).plan
    total = sum(row.macs for row in result.plan.rows)
    assert partial.coverage == pytest.approx(1 - rows["0"].macs / total)
    # What the user wants in float is no failure.
    assert partial.stored_share == 1.0
    assert partial.num_quantized == 2


def test_weights_without_a_form_count_against_what_is_stored() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Parameter(torch.randn(32, 96)), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.table.sum(1)

    plan = quantize_layers(Table().eval(), (torch.randn(3, 32),), recipe="int8_weight_only").plan
    assert {row.name: row.weights for row in plan.rows} == {"Table": 32 * 96, "layer": 32 * 32}
    assert plan.stored_share == 0.25


def test_parameters_beside_those_that_are_stored_say_why_they_are_float() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.added = nn.Parameter(torch.randn(32, 64)), nn.Parameter(torch.randn(32, 64))
            self.small = nn.Parameter(torch.randn(64, 8))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight + self.added.sum(0)) @ self.small

    plan = quantize_layers(Own().eval(), (torch.randn(3, 32),), recipe="int8_weight_only").plan
    reasons = {row.name: row.reason for row in plan.rows if row.action == "float"}
    assert reasons == {"added": "no product reads it", "small": "it has fewer than 1024 values"}
