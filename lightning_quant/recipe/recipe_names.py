"""Names inside a recipe, looked up when it is written: observers, accuracy steps, schemes and what overrides map to."""

from lightning_quant.arguments.choice import check_choice
from lightning_quant.errors import QuantizationError
from lightning_quant.recipe.recipe import AnyRecipe


def check_names(recipe: AnyRecipe) -> None:
    """Make sure that there is whatever a recipe names.

    Raises:
        QuantizationError: there is not; the message has the closest.
    """
    # Those who know the names know recipes, too: they are asked when one is written, by when all are there.
    from lightning_quant import runtimes
    from lightning_quant.calibrate.ladder import check_steps
    from lightning_quant.layers.storage import SCHEMES
    from lightning_quant.planned.overrides import check_targets
    from lightning_quant.ranges.observers import OBSERVERS

    if not recipe.needs_calibration:
        for scheme in recipe.schemes:
            check_choice("recipe.schemes", scheme, SCHEMES)
        check_targets(recipe)
        return
    check_choice("recipe.calibration_observer", recipe.calibration_observer, OBSERVERS)
    check_choice("recipe.training_observer", recipe.training_observer, OBSERVERS)
    check_steps(recipe)
    check_targets(recipe)
    if not runtimes.that(lambda runtime: recipe.activation_grid in runtime.TABLE.grids):
        raise QuantizationError(
            "Expected `activation` to be a grid that some runtime runs, such as one of 2 to 8 or 16 bits, but got "
            f"{recipe.activation_grid}."
        )
