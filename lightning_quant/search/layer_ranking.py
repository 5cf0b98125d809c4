"""What safer schemes of layers gain and cost, where a recipe quantizes layer by layer: each layer alone in each scheme.

There are no tensors between layers to be spared, so a layer's parts are the layer itself, and what a scheme gains is
measured and no sum of others.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from lightning_quant.calls.calls import Call
from lightning_quant.errors import QuantizationError
from lightning_quant.graph.plan import Row
from lightning_quant.layers.layer import StoredLayer
from lightning_quant.layers.placement import placed
from lightning_quant.measure.own_statistics import error_of
from lightning_quant.planned.layerwise import Layerwise, quantize_layers
from lightning_quant.search.cheapest import Part
from lightning_quant.search.choice import FLOAT, HALF, STORED
from lightning_quant.search.places import owner_of, places_of
from lightning_quant.search.relaxations import Relaxations
from lightning_quant.surgery.host import moved_call
from lightning_quant.surgery.routing import evaluation_mode, without_fast_path
from lightning_quant.terminal.progress import tracked

_HALF_BYTES, _FLOAT_BYTES = 2.0, 4.0


@torch.no_grad()
def rank_layers(whole: Layerwise, calls: list[Call], *, by_time: bool = False) -> Relaxations:
    """Measure every layer in every scheme: one run of all calls for each.

    Args:
        whole: the whole recipe.
        calls: of the module, best such as no layer was tried on.
        by_time: whether what computes in float costs time, by its multiply-adds, and not bytes.
    """
    own = {
        name: {place: whole.layers[place] for place in places}
        for name, places in places_of(whole.root, whole.layers, whole.plan, whole.recipe.overrides).items()
    }
    eights = {n: layers for n, layers in _in_scheme(whole, STORED, own).items() if bytes_of(layers) >= bytes_of(own[n])}
    # In half the bytes, and converted for every call. Of those that share a weight, not all would follow.
    halves = (
        frozenset()
        if by_time
        else frozenset(
            name
            for name, layers in _in_scheme(whole, HALF, own).items()
            if {layer.scheme.storage for layer in own[name].values()} != {HALF}
            and len({*map(id, layers.values())}) == 1
        )
    )
    calls = [moved_call(*call) for call in calls]
    with evaluation_mode(whole.root), without_fast_path():
        exact = [whole.root(*args, **kwargs) for args, kwargs in calls]

        def error(layers: Mapping[str, nn.Module]) -> float:
            with placed(whole.root, layers):
                return error_of(exact, [whole.root(*args, **kwargs) for args, kwargs in calls])

        parts = []
        for name, layers in tracked(list(own.items()), "Ranking", "layer"):
            noise, left = error(layers), error(eights[name]) if name in eights else math.inf
            parts.append(Part(frozenset({name}), True, noise, {STORED: left} if left < noise else {}))
    prices = {}
    rows = {row.name: row for row in whole.plan.rows}
    for name, layers in own.items():
        each = _HALF_BYTES if name in halves else _FLOAT_BYTES
        prices[name, FLOAT] = _price(rows[name], layers, each * rows[name].weights, by_time=by_time)
    for part in parts:
        for name in part.users if part.left else ():
            prices[name, STORED] = _price(rows[name], own[name], bytes_of(eights[name]), by_time=by_time)
    return Relaxations(tuple(parts), tuple(own), prices, halves)


def bytes_of(layers: Mapping[str, StoredLayer]) -> int:
    """Return the bytes of the weights and scales of layers, shared ones once."""
    stored = [tensor for layer in layers.values() for name in layer.names for tensor in layer.stored(name)]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in stored if t is not None}.values())


def _in_scheme(
    whole: Layerwise, scheme: str, own: Mapping[str, Mapping[str, StoredLayer]]
) -> dict[str, dict[str, StoredLayer]]:
    """Return the layers by name, and by place, in another scheme: those that it is near enough to float for."""
    args, kwargs = whole.call()
    names = frozenset(owner_of(whole.root, place) for places in own.values() for place in places)
    try:
        made = quantize_layers(whole.root, args, kwargs, recipe=scheme, runtime=whole.plan.runtime, only=names).layers
    except QuantizationError:  # The runtime has none, or no layer is near enough.
        return {}
    able = {name: places for name, places in own.items() if places.keys() <= made.keys()}
    return {name: {place: made[place] for place in places} for name, places in able.items()}


def _price(row: Row, layers: Mapping[str, StoredLayer], size: float, *, by_time: bool) -> float:
    """Return the bytes on top, or the multiply-adds that leave the integers, which are none where they are float."""
    if by_time:
        in_integers = any(layer.scheme.arithmetic == "integer" for layer in layers.values())
        return float(row.macs) if in_integers else 0.0
    return max(0.0, size - bytes_of(layers))
