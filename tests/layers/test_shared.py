"""Weights that more than one place reads."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.errors import PlanError
from lightning_quant.graph.table import Selection
from lightning_quant.layers import class_for
from lightning_quant.layers.shared import keep_ties
from lightning_quant.layers.trial import Trial
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.recipe.recipe import LayerRecipe


class Reading(nn.Module):
    """Uses the weight of one layer, the type of another's, and calls both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).to(self.third.weight.dtype)) + x @ self.second.weight
        return self.third(y)


def test_layer_whose_weight_is_read_beside_it_is_stored_and_named() -> None:
    model, x = Reading().eval(), torch.randn(4, 8)
    quantized = quantize_layers(model, (x,), recipe="int8_weight_only", runtime="torch")
    rows = {row.name: row for row in quantized.plan.rows}

    assert sorted(quantized.layers) == ["first", "second.stored_parameters", "third"]
    assert (rows["second"].action, rows["second"].weights) == ("int8 weights", 64)
    assert "reads its weight" in rows["second"].reason
    assert 35 < signal_to_noise(model(x), quantized.quantized()(x)) < 80


def test_recurrent_layer_whose_weight_is_read_beside_it_stays_float() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.GRU(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x)[0]) @ self.inner.weight_hh_l0.T

    model, x = Recurrent().eval(), torch.randn(4, 8)
    quantized = quantize_layers(model, (x,), recipe="int8_weight_only", runtime="torch")
    assert sorted(quantized.layers) == ["head"]
    with pytest.raises(PlanError, match=r"inner .*reads its weight"):
        quantize_layers(model, (x,), recipe="int8_weight_only", selection=Selection(exclude=("head",)))


def test_layers_of_one_weight_get_the_form_of_the_one_that_needs_most_bits() -> None:
    recipe = LayerRecipe("both", ("weight_only_4bit", "weight_only"), floor_db=0.0)
    known: dict[Any, Any] = {}
    table, head = nn.Embedding(8, 32), nn.Linear(32, 8, bias=False)
    head.weight = table.weight
    trials = {name: Trial(name, layer, recipe, known) for name, layer in (("table", table), ("head", head))}
    for trial in trials.values():
        trial.allow(class_for(trial.float_layer), half_arithmetic=True)
        trial.finish()
    assert {name: trial.bits for name, trial in trials.items()} == {"table": 8, "head": 4}

    keep_ties(trials)

    assert {name: trial.bits for name, trial in trials.items()} == {"table": 8, "head": 8}
