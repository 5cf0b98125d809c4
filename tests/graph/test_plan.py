"""Shares of a plan are of multiply-adds and weights."""

import torch
from prepared_graphs import rows_of
from torch import nn

from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_multiply_adds_are_those_of_the_definition() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.Conv2d(6, 12, 3, groups=3),
        nn.ConvTranspose2d(12, 5, 2, stride=2),
        nn.Flatten(),
        nn.Linear(5 * 4 * 4, 7),
    )
    macs = {row.name: row.macs for row in rows_of(model, IMAGE).values()}
    batch = len(IMAGE)
    assert macs["0"] == batch * 4 * 4 * 6 * 3 * 9
    assert macs["1"] == batch * 2 * 2 * 12 * 2 * 9
    assert macs["2"] == batch * 2 * 2 * 12 * 5 * 4
    assert macs["4"] == batch * 80 * 7


def test_coverage_is_the_share_of_integer_multiply_adds() -> None:
    model = nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 10)).eval()
    x = torch.randn(2, 10)
    assert prepare(model, (x,)).plan.coverage == 1.0
    assert prepare(model, (x,), selection=Selection(exclude=("2",))).plan.coverage == 0.5
