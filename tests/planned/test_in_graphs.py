"""Layers that recipes of layers store inside a model whose graphs run in integers."""

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.errors import PlanError
from lightning_quant.export.prepare import prepare
from lightning_quant.planned.in_graphs import store_layers
from lightning_quant.recipe.recipe import Recipe


class Reader(nn.Module):
    """A table of vectors and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(50, 64), nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(self.table(tokens).mean(1))))


def stored(overrides: dict[str, str], runtime: str = "onnxruntime") -> tuple[dict[str, nn.Module], dict[str, str]]:
    recipe = Recipe(overrides=overrides)
    model = prepare(Reader().eval(), (torch.randint(50, (3, 7)),), recipe=recipe, runtime=runtime)
    layers, plan = store_layers(model, recipe, model.plan, model.left)
    return layers, {row.name: row.action for row in plan.rows}


def test_what_no_graph_has_a_form_of_is_stored_in_eight_bits_and_what_was_named_as_named() -> None:
    layers, actions = stored({"first": "int4_weight_only"})
    assert set(layers) == {"table", "first"}
    assert (actions["table"], actions["first"], actions["last"]) == ("int8 weights", "int4 weights", "int8")


def test_a_runtime_without_such_layers_refuses_them_by_name() -> None:
    with pytest.raises(PlanError, match=r"`overrides` for runtime 'inductor' .*\['int8_weight_only'\]\. Use .*onnx"):
        stored({"first": "int8_weight_only"}, "inductor")
