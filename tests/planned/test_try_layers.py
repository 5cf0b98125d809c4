"""Each layer is tried in one call, and the module is left as it was."""

import torch
from torch import nn

from lightning_quant.calls.calls import Call
from lightning_quant.graph.table import Selection
from lightning_quant.planned.try_layers import try_layers
from lightning_quant.recipe.recipe import LayerRecipe

RECIPE = LayerRecipe("both", ("weight_only_4bit", "weight_only"), floor_db=25.0)


def test_layers_get_the_first_scheme_that_is_close_enough_and_others_say_why() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(16, 32)
    keys = [sorted(vars(child)) for child in model.modules()]
    found = try_layers(model, Call((x,)), RECIPE, Selection(exclude=("2",)), half_arithmetic=True)

    assert found["0"].layer is not None
    assert found["0"].layer.scheme.action == "int8 weights"
    assert "int4 weights" in found["0"].reason
    assert (found["2"].layer, found["2"].excluded) == (None, True)
    assert [sorted(vars(child)) for child in model.modules()] == keys
    assert not any(child._forward_hooks for child in model.modules())
    assert model.training


def test_what_a_step_does_not_call_stays_float_and_only_those_that_were_asked_for_are_tried() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)), torch.randn(4, 32)
    found = try_layers(model, Call((x,)), RECIPE, Selection(), half_arithmetic=True, parts=("1",))
    assert "the training step does not call it" in found["0"].reason
    assert found["1"].layer is not None
    assert set(try_layers(model, Call((x,)), RECIPE, Selection(), half_arithmetic=True, only=frozenset({"1"}))) == {"1"}
