"""Where stored layers stand, by the names that overrides know."""

from collections.abc import Mapping

from torch import nn

from lightning_quant.graph.plan import Plan
from lightning_quant.graph.table import matches
from lightning_quant.layers.layer import StoredLayer
from lightning_quant.layers.parameters import CHILD


def places_of(
    root: nn.Module, layers: Mapping[str, StoredLayer], plan: Plan, said: Mapping[str, str]
) -> dict[str, list[str]]:
    """Return the layers that nobody spoke for, by the names that overrides know, with all places of each.

    Layers that share a weight are one: what one of them becomes the others follow.

    Args:
        root: the float module.
        layers: name of every place to the stored layer for it.
        plan: with a row for each.
        said: the user's own overrides.
    """
    rows = {row.name: row for row in plan.rows}
    names: dict[int, str] = {}
    groups: dict[str, list[str]] = {}
    for place, layer in layers.items():
        weights = [layer.stored(name)[0].data_ptr() for name in layer.names]
        name = next((names[weight] for weight in weights if weight in names), owner_of(root, place))
        names.update(dict.fromkeys(weights, name))
        groups.setdefault(name, []).append(place)
    return {
        name: places
        for name, places in groups.items()
        if name in rows and not any(matches(pattern, name, rows[name].kind) for pattern in said)
    }


def owner_of(root: nn.Module, place: str) -> str:
    """Return the name of the module whose weights stand in a place, as overrides know it."""
    return place.removesuffix(CHILD).removesuffix(".") or type(root).__name__
