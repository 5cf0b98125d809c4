"""Which recipes of layers a runtime runs, and what else has them."""

from lightning_quant import runtimes
from lightning_quant.errors import PlanError
from lightning_quant.recipe import recipe as recipes
from lightning_quant.recipe.recipe import LayerRecipe


def check_runs(runtime: str, recipe: LayerRecipe) -> bool:
    """Make sure that a runtime runs the layers of a recipe; tell whether it computes in half precision.

    Raises:
        PlanError: it does not; the message says why, or who does.
    """
    where = runtimes.get(runtime, exporting=True)
    if where.HALF_ARITHMETIC is None:
        raise PlanError(
            f"Expected `runtime` to run quantized layers for {recipe.name!r}, but {runtime!r} does not. Use runtime "
            f"{runtimes.that(lambda other: other.runs_layers(recipe.schemes))}, or recipe 'int8'."
        )
    every = [recipe, *(recipes.RECIPES[target] for target in recipe.overrides.values() if target in recipes.RECIPES)]
    schemes = [name for one in every if not one.needs_calibration for name in one.schemes]
    refused = next((name for name in schemes if name in where.LAYER_REFUSALS), None)
    if refused is not None:
        reason = where.LAYER_REFUSALS[refused]
        raise PlanError(f"Expected a recipe that {runtime!r} runs, but got {recipe.name!r}: {reason}.")
    return where.HALF_ARITHMETIC
