"""The steps of the ladder by name."""

from lightning_quant.calibrate.steps import STEPS
from lightning_quant.recipe.recipe import RECIPES


def test_every_step_says_what_work_it_is_and_recipes_name_no_others() -> None:
    assert all(callable(step.run) and step.passes >= 0 for step in STEPS.values())
    named = {name for recipe in RECIPES.values() for name in getattr(recipe, "accuracy_steps", ())}
    assert named <= set(STEPS)
