"""The steps of the ladder by name."""

from torch import nn
from uneven_chains import prepared_chain

from lightning_quant.calibrate.groups import scaling_groups
from lightning_quant.calibrate.steps import STEPS, is_depthwise
from lightning_quant.recipe.recipe import RECIPES


def test_every_step_says_what_work_it_is_and_recipes_name_no_others() -> None:
    assert all(callable(step.run) and step.passes >= 0 for step in STEPS.values())
    named = {name for recipe in RECIPES.values() for name in getattr(recipe, "accuracy_steps", ())}
    assert named <= set(STEPS)


def test_scaling_costs_nothing_where_a_reader_has_a_channel_for_each_output() -> None:
    _, prepared, _ = prepared_chain(nn.ReLU)
    groups = {group.consumers: group for group in scaling_groups(prepared)}
    assert is_depthwise(prepared, groups[(":layers.3",)])
    assert not is_depthwise(prepared, groups[(":layers.6",)])
