"""Mixed precision by hand: what a recipe's overrides mean for the operators of a module."""

from collections.abc import Mapping
from dataclasses import replace

from lightning_quant import recipe as recipes
from lightning_quant.errors import PlanError, QuantizationError
from lightning_quant.graph.analyze import Analysis
from lightning_quant.graph.plan import Operator, identify
from lightning_quant.graph.table import Selection, matches
from lightning_quant.recipe import Recipe

FLOAT = "float"


def without_float_overrides(selection: Selection, recipe: Recipe) -> Selection:
    """Return a selection that leaves out what overrides keep in float."""
    kept = tuple(pattern for pattern, target in recipe.overrides.items() if target == FLOAT)
    return replace(selection, exclude=(*selection.exclude, *kept))


def override_weights(recipe: Recipe, operators: Mapping[str, Operator], analysis: Analysis) -> dict[str, int]:
    """Return operator to the highest integer of its weight, for those that overrides give another grid.

    Raises:
        QuantizationError: an override names no recipe, or one that needs other activations than this recipe's.
        PlanError: a pattern matches no weighted operator.
    """
    grids = {pattern: _grid(recipe, pattern, target) for pattern, target in recipe.overrides.items() if target != FLOAT}
    kinds = {row.name: row.kind for row in analysis.plan.rows}
    found: dict[str, int] = {}
    used: set[str] = set()
    for graph in analysis.plan.graphs:
        for operator in graph.operators:
            name = ".".join(part for part in (graph.path, operator.key) if part)
            fitting = [pattern for pattern in grids if operator.weight and matches(pattern, name, kinds.get(name, ""))]
            used.update(fitting)
            if fitting:
                found[identify(graph.path, operator.key)] = grids[fitting[0]]
    unused = sorted(set(grids) - used)
    if unused:
        raise PlanError(
            f"Expected `overrides` to hold patterns on names or types of quantized layers, but got {unused[0]!r}, "
            f"which matches none of {', '.join(sorted(o.key for o in operators.values() if o.weight)[:8])}."
        )
    return found


def _grid(recipe: Recipe, pattern: str, target: str) -> int:
    other = recipes.get(target)
    if not isinstance(other, Recipe) or other.activation != recipe.activation:
        raise QuantizationError(
            f"Expected `overrides` to map {pattern!r} to 'float' or a recipe with the activations of {recipe.name!r}, "
            f"but got {target!r}. Keep that layer in float instead."
        )
    return other.weight.quant_max
