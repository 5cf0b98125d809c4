"""Mixed precision by hand: what a recipe's overrides mean for the operators of a module."""

import re
from collections.abc import Mapping
from dataclasses import replace

from lightning_quant.arguments.choice import check_choice, did_you_mean
from lightning_quant.errors import PlanError, QuantizationError
from lightning_quant.graph.analyze import Analysis
from lightning_quant.graph.plan import Edge, Operator
from lightning_quant.graph.rereads import is_product
from lightning_quant.graph.table import Selection, matches
from lightning_quant.recipe import recipe as recipes
from lightning_quant.recipe.recipe import AnyRecipe, Recipe

FLOAT = "float"
_WEIGHTS = re.compile(r"int([2-8])_weights")


def select(selection: Selection, recipe: AnyRecipe) -> Selection:
    """Return a selection that leaves out what overrides keep in float or have stored by a recipe of layers."""
    kept = tuple(pattern for pattern, target in recipe.overrides.items() if target == FLOAT)
    stored = tuple(stored_by(recipe).items()) if recipe.needs_calibration else ()
    return replace(selection, exclude=(*selection.exclude, *kept), stored=stored)


def override_weights(recipe: Recipe, operators: Mapping[str, Operator], analysis: Analysis) -> dict[str, int]:
    """Return operator to the highest integer of its weight, for those that overrides give another grid.

    Raises:
        QuantizationError: an override names no recipe, or one that needs other activations than this recipe's.
        PlanError: a pattern matches no weighted operator.
    """
    elsewhere = {FLOAT, *stored_by(recipe).values()}
    grids = {p: _grid(recipe, p, target) for p, target in recipe.overrides.items() if target not in elsewhere}
    kinds = {row.name: row.kind for row in analysis.plan.rows}
    chosen = dict.fromkeys(ends(recipe, operators), 127)
    used: set[str] = set()
    for graph in analysis.plan.graphs:
        for operator in graph.operators:
            name = operator.name
            fitting = [pattern for pattern in grids if operator.weight and matches(pattern, name, kinds.get(name, ""))]
            used.update(fitting)
            if fitting:
                chosen[operator.identity] = grids[fitting[0]]
    unused = sorted(set(grids) - used)
    if unused:
        raise PlanError(
            f"Expected `overrides` to hold patterns on names or types of quantized layers, but got {unused[0]!r}, "
            f"which matches none of {', '.join(sorted(o.key for o in operators.values() if o.weight)[:8])}."
        )
    return chosen


def ends(recipe: Recipe, operators: Mapping[str, Operator]) -> list[str]:
    """Return the weighted operators that keep eight bits where the recipe says so: the first ones and the last one.

    Where there are no others none does: nothing would have the recipe's bits.

    Source: Esser et al. 2020, arXiv:1902.08153, section 3 (as do nearly all results with few bits).
    """
    weighted = [operator for operator in operators.values() if operator.weight]
    if not recipe.wide_ends or not weighted:
        return []
    kept = [o.identity for o in weighted if o.reads[0] == weighted[0].reads[0] or o is weighted[-1]]
    return kept if len(kept) < len(weighted) else []


def narrow_products(recipe: Recipe, analysis: Analysis) -> frozenset[str]:
    """Return the products that read fewer bits than sums and pools do: all but those that keep eight."""
    if not recipe.wide_ends or recipe.activation.bits >= 8:
        return frozenset()
    operators = {o.identity: o for graph in analysis.plan.graphs for o in graph.operators}
    return frozenset(i for i, o in operators.items() if is_product(o)) - set(ends(recipe, operators))


def wide_edges(recipe: Recipe, operators: Mapping[str, Operator], edges: Mapping[str, Edge]) -> frozenset[str]:
    """Return the edges that keep eight bits beside these: all but those that only other products read.

    Fewer bits make products cheaper, and sums and pools no cheaper. What shares a scale has as many bits.
    """
    if not recipe.wide_ends or recipe.activation.bits >= 8:
        return frozenset()
    at_ends = ends(recipe, operators)

    def groups_read(by_ends: bool) -> set[str]:
        products = [o for o in operators.values() if is_product(o) and (o.identity in at_ends) == by_ends]
        read = {edge for o in products for edge in o.reads}
        return {edges[identity].shared for identity in read if identity in edges}

    narrow = groups_read(by_ends=False) - groups_read(by_ends=True)
    return frozenset(identity for identity, edge in edges.items() if edge.shared not in narrow)


def stored_by(recipe: Recipe) -> dict[str, str]:
    """Return pattern to recipe, for overrides that name a recipe of layers.

    Not those with ranges that arrive with each row: their sums are not those of the simulation, to the bit.
    """
    named = {pattern: target for pattern, target in recipe.overrides.items() if isinstance(target, str)}
    recipe_of = {pattern: recipes.RECIPES.get(target) for pattern, target in named.items()}
    return {p: r.name for p, r in recipe_of.items() if r and not r.needs_calibration and "dynamic" not in r.schemes}


def check_targets(recipe: AnyRecipe) -> None:
    """Make sure that overrides map to what there is.

    Raises:
        QuantizationError: one names no recipe, or one that needs other activations than this recipe's.
    """
    if not recipe.needs_calibration:
        able = [FLOAT, *(r.name for r in recipes.RECIPES.values() if not r.needs_calibration and not r.gptq)]
        for pattern, target in recipe.overrides.items():
            check_choice(f"overrides[{pattern!r}]", target, able)
        return
    elsewhere = {FLOAT, *stored_by(recipe).values()}
    for pattern, target in recipe.overrides.items():
        if target not in elsewhere:
            _grid(recipe, pattern, target)


def _grid(recipe: Recipe, pattern: str, target: str) -> int:
    bits = _WEIGHTS.fullmatch(target) if isinstance(target, str) else None
    if bits is not None:
        return 2 ** (int(bits[1]) - 1) - 1
    other = recipes.RECIPES.get(target) if isinstance(target, str) else None
    if other is None or not other.needs_calibration or other.activation != recipe.activation:
        raise QuantizationError(
            f"Expected `overrides` to map {pattern!r} to 'float', 'int2_weights' to 'int8_weights', or the name of a "
            f"recipe with the activations of {recipe.name!r} or with no activations at all, but got {target!r}."
            f"{did_you_mean(target, [FLOAT, *recipes.RECIPES])}"
        )
    return other.weight_grid.high
