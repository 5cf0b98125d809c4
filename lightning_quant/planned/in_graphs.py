"""Layers that recipes of layers store inside a model whose graphs run in integers."""

from typing import Any

from torch import nn

from lightning_quant import runtimes
from lightning_quant.errors import PlanError
from lightning_quant.graph.plan import Plan
from lightning_quant.graph.table import Selection, matches
from lightning_quant.layers.leftovers import with_stored
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.planned.overrides import stored_by
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.recipe.recipe import Recipe

_BY_ITSELF = "int8_weight_only"


def store_layers(
    model: PlannedModel, recipe: Recipe, plan: Plan, left: frozenset[str]
) -> tuple[dict[str, nn.Module], Plan]:
    """Quantize the layers that recipes of layers store, on the weights and the captured call as they are.

    These are those that overrides name, and those that graphs have no integer form of, in eight bits.

    Args:
        model: the float module and its captured call.
        recipe: for its overrides.
        plan: of the graphs.
        left: labels of the layers that graphs have no integer form of.

    Returns:
        name of every place to the layer for it, and the plan with rows that say so.

    Raises:
        PlanError: a pattern names no layer that its recipe can quantize, or the runtime runs no such layers.
    """
    args, kwargs = model.call()
    layers: dict[str, nn.Module] = {}
    stored = stored_by(recipe)
    in_graphs = model.runtime.LAYERS_IN_GRAPHS
    if stored and not in_graphs:
        raise PlanError(
            f"Expected `overrides` for runtime {plan.runtime!r} to name 'float' or grids of 4 to 8 bits, but got "
            f"{sorted(set(stored.values()))}. Use {runtimes.that(lambda other: other.LAYERS_IN_GRAPHS)}, or keep those "
            "layers in float."
        )
    for pattern, name in stored.items():
        chosen = Selection(include=(pattern,))
        where: dict[str, Any] = {"recipe": name, "runtime": plan.runtime, "selection": chosen}
        try:
            layerwise = quantize_layers(model.root, args, kwargs, **where)
        except PlanError as error:
            raise PlanError(f"Of `overrides`, {pattern!r} is to be stored by {name!r}: {error}") from error
        named = {row.name: row for row in layerwise.plan.rows if matches(pattern, row.name, row.kind)}
        plan = with_stored(model.root, plan, {label: row for label, row in named.items() if label not in layers})
        layers = {**layerwise.layers, **layers}
    if left and in_graphs:
        try:
            layerwise = quantize_layers(model.root, args, kwargs, recipe=_BY_ITSELF, runtime=plan.runtime, only=left)
        except PlanError:
            # Rows that say why the graph has no form of a layer stay as they are.
            return layers, plan
        plan = with_stored(model.root, plan, {row.name: row for row in layerwise.plan.rows if row.name in left})
        layers = {**layerwise.layers, **layers}
    return layers, plan
