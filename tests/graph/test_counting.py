"""Every multiply-add of a call is in one row of the plan, and every weight too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.export.prepare import prepare
from lightning_quant.graph.plan import Plan
from lightning_quant.graph.table import Selection
from lightning_quant.planned.layerwise import quantize_layers

BATCH, TIME, WIDTH, HIDDEN, CLASSES = 4, 5, 8, 16, 3
X = torch.randn(BATCH, TIME, WIDTH)


class Calling(nn.Module):
    """A layer, called by some code, and a linear layer behind it."""

    def __init__(self, layer: nn.Module, features: int, code: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.code, self.label = layer, code, nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.label(self.code(self.layer, x))


class Loop(nn.Module):
    """An LSTM cell in a loop over time, which fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], HIDDEN)
        states = []
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            states.append(h)
        return torch.stack(states, 1)


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))


def attend(_: nn.Module, x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


PLACES = BATCH * TIME
ATTENTION = PLACES * 4 * WIDTH * WIDTH + 2 * PLACES * TIME * WIDTH
FLOAT = {
    "lstm": (
        lambda: Calling(nn.LSTM(WIDTH, HIDDEN, 2, batch_first=True), HIDDEN, lambda layer, x: layer(x)[0]),
        PLACES * 4 * HIDDEN * (WIDTH + HIDDEN + 2 * HIDDEN),
    ),
    "gru": (
        lambda: Calling(nn.GRU(WIDTH, HIDDEN, batch_first=True), HIDDEN, lambda layer, x: layer(x)[0]),
        PLACES * 3 * HIDDEN * (WIDTH + HIDDEN),
    ),
    "cells": (lambda: Calling(Loop(), HIDDEN, lambda layer, x: layer(x)), PLACES * 4 * HIDDEN * (WIDTH + HIDDEN)),
    "bilinear": (lambda: Calling(nn.Bilinear(WIDTH, WIDTH, 2), 2, lambda layer, x: layer(x, x)), PLACES * WIDTH**2 * 2),
    "attention": (
        lambda: Calling(nn.MultiheadAttention(WIDTH, 2, batch_first=True), WIDTH, lambda layer, x: layer(x, x, x)[0]),
        ATTENTION,
    ),
    "encoder": (
        lambda: Calling(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, batch_first=True), 2),
            WIDTH,
            lambda layer, x: layer(x),
        ),
        2 * (ATTENTION + 2 * PLACES * WIDTH * HIDDEN),
    ),
    "scaled dot product": (lambda: Calling(nn.Identity(), WIDTH, attend), 2 * PLACES * TIME * WIDTH),
    "einsum": (
        lambda: Calling(Weight(), WIDTH, lambda layer, x: torch.einsum("btd,de->bte", x, layer.weight)),
        PLACES * WIDTH * WIDTH,
    ),
    "matmul": (lambda: Calling(Weight(), WIDTH, lambda layer, x: x @ layer.weight), PLACES * WIDTH * WIDTH),
    "addmm": (
        lambda: Calling(
            Weight(),
            WIDTH,
            lambda layer, x: torch.addmm(x.new_zeros(WIDTH), x.flatten(0, 1), layer.weight).unflatten(0, (BATCH, TIME)),
        ),
        PLACES * WIDTH * WIDTH,
    ),
}


def unique_weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)


def check_sums(model: nn.Module, plan: Plan, total: int) -> None:
    assert sum(row.macs for row in plan.rows) == total
    assert sum(row.weights for row in plan.rows) == unique_weights(model)
    assert all(row.reason for row in plan.rows if row.action == "float")
    assert len({row.name for row in plan.rows}) == len(plan.rows)


# Multiply-adds of products with weights, which run in integers.
INTEGER = {
    "attention": PLACES * 4 * WIDTH * WIDTH,
    "encoder": 2 * (PLACES * 4 * WIDTH * WIDTH + 2 * PLACES * WIDTH * HIDDEN),
    **dict.fromkeys(("einsum", "matmul", "addmm"), PLACES * WIDTH * WIDTH),
}
# Layers whose weights are stored in eight bits, beside graphs or as their operators.
STORED = ("lstm", "gru", "cells", *INTEGER)


@pytest.mark.parametrize("name", list(FLOAT))
def test_what_stays_float_counts_as_float(name: str) -> None:
    build, expected = FLOAT[name]
    model = build().eval()
    weights = model.label.weight.numel()
    plan = prepare(model, (X,)).plan
    check_sums(model, plan, expected + PLACES * weights)
    integer = INTEGER.get(name, 0) + PLACES * weights
    assert plan.coverage == pytest.approx(integer / (expected + PLACES * weights))
    assert plan.weight_coverage == (1.0 if name in STORED else pytest.approx(weights / unique_weights(model)))


def test_a_table_is_looked_up_without_multiply_adds() -> None:
    for table in (nn.Embedding(500, WIDTH), nn.EmbeddingBag(500, WIDTH)):
        model = nn.Sequential(table, nn.Linear(WIDTH, CLASSES)).eval()
        tokens = torch.randint(0, 500, (BATCH, TIME))
        assert prepare(model, (tokens,)).plan.weight_coverage == 1.0
        plan = prepare(model, (tokens,), selection=Selection(exclude=("0",))).plan
        assert plan.coverage == 1.0
        assert plan.weight_coverage == pytest.approx(CLASSES / (500 + CLASSES))


def test_a_weight_tied_to_a_float_layer_is_no_stored_weight() -> None:
    model = nn.Sequential(nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50, bias=False)).eval()
    model[1].weight = model[0].weight
    tokens = torch.randint(0, 50, (BATCH, TIME))
    plan = prepare(model, (tokens,), selection=Selection(exclude=("0",))).plan
    assert (plan.coverage, plan.weight_coverage) == (1.0, 0.0)
    assert prepare(model, (tokens,)).plan.weight_coverage == 1.0


class Repeating(nn.Module):
    """A loop that fx cannot trace, around a layer that it can, and a product by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            if float(x.sum()) < 1e9:
                x = self.inner(x) @ self.weight
        return x


def test_parts_that_run_several_times_count_as_often() -> None:
    model, product = Repeating().eval(), PLACES * WIDTH * WIDTH
    plan = prepare(model, (X,)).plan
    macs = {row.name: row.macs for row in plan.rows}
    assert macs["inner.0"] == 3 * product
    assert macs["(forward)"] == 3 * product
    check_sums(model, plan, 6 * product)
    assert plan.coverage == 0.5


def test_layers_of_unknown_kinds_have_rows_inside_what_cannot_be_traced() -> None:
    class Product(Weight):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.product, self.table = Product(), nn.Embedding(7, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:
                return x
            return self.product(x) + self.table(x.argmax(-1) % 7)

    model = Calling(Untraceable(), WIDTH, lambda layer, x: layer(x)).eval()
    plan = prepare(model, (X,)).plan
    rows = {row.name: row for row in plan.rows}
    assert (rows["layer.product"].kind, rows["layer.product"].macs) == ("Product", PLACES * WIDTH * WIDTH)
    assert (rows["layer.table"].kind, rows["layer.table"].weights) == ("Embedding", 7 * WIDTH)
    check_sums(model, plan, PLACES * WIDTH * (WIDTH + CLASSES))


def test_a_layer_called_twice_shares_what_was_counted_in_it() -> None:
    model = Calling(nn.Linear(WIDTH, WIDTH), WIDTH, lambda layer, x: layer(layer(x)[:, :1])).eval()
    macs = {row.name: row.macs for row in prepare(model, (X,)).plan.rows}
    assert (macs["layer"], macs["layer#1"]) == (PLACES * WIDTH * WIDTH, BATCH * WIDTH * WIDTH)


def test_index_arithmetic_and_constants_have_no_row() -> None:
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.shift = nn.Conv2d(3, 2, 1), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(x.shape[2]) + 1
            grid = (torch.cat([places, places]) * 2)[: x.shape[3]]
            return self.conv(x) + grid.float() * (self.shift + 0.5)

    rows = prepare(Grid().eval(), (torch.randn(2, 3, 6, 6),)).plan.rows
    assert [row.name for row in rows if not row.weights] == ["add#2"]


@pytest.mark.parametrize("recipe", ["int8_dynamic", "int8_weight_only"])
@pytest.mark.parametrize("name", list(FLOAT))
def test_recipes_of_layers_count_what_no_layer_computes(name: str, recipe: str) -> None:
    build, expected = FLOAT[name]
    model = build().eval()
    plan = quantize_layers(model, (X,), recipe=recipe).plan
    total = expected + PLACES * model.label.weight.numel()
    check_sums(model, plan, total)
    beside = {"attention": 2, "encoder": 4, "scaled dot product": 2}.get(name, 0) * PLACES * TIME * WIDTH
    beside = beside or (expected if name in ("bilinear", "einsum", "matmul", "addmm") else 0)
    assert plan.coverage == pytest.approx(1 - beside / total)
