"""What keeping operators out of integers gains and costs: measured once, part by part, on held-back calls.

What is rounded falls into parts: the weight of an operator, and the tensors that share a scale. A part is rounded for
as long as an operator needs it in integers, so that a tensor is spared only when all that write or read it are kept out
together. Noise of parts adds up where it is small, so each is measured with nothing else rounded: of two bad layers
neither hides the other. Weights can stay stored in eight bits where only tensors are to be spared.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_quant.calls.calls import Call
from lightning_quant.errors import QuantizationError
from lightning_quant.graph.table import Selection
from lightning_quant.layers import class_for
from lightning_quant.layers.placement import placed
from lightning_quant.measure.own_statistics import error_of
from lightning_quant.measure.rounded_parts import name_of, touched_edges
from lightning_quant.numerics.exact import exact_arithmetic
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.search.cheapest import Part, cheapest
from lightning_quant.search.choice import FLOAT, HALF, OUT, STORED, WIDE, Choice
from lightning_quant.search.places import places_of
from lightning_quant.search.wide_weights import bytes_of_value, in_eight_bits
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode
from lightning_quant.terminal.progress import tracked

# Beside the gain of a step counts its price: shares of what everything in float would cost, of the operators that leave
# the integers, and this on top, so that what costs nothing is no better than what gains many times as much.
_LEAST_PRICE = 0.25
# The cheapest first.
_SAFER = (WIDE, STORED, FLOAT)


@dataclass(frozen=True)
class Relaxations:
    """Parts, and what sparing them costs.

    Attributes:
        parts: all that is rounded.
        operators: names in the plan's order.
        prices: name and scheme to what it costs, in bytes or in multiply-adds, of all schemes that are possible.
        halves: names of those whose weights float16 spares, which float then stands for.
    """

    parts: tuple[Part, ...]
    operators: tuple[str, ...]
    prices: Mapping[tuple[str, str], float]
    halves: frozenset[str] = frozenset()

    def error(self, kept: Mapping[str, str]) -> float:
        """Return the noise that is left, as the sum of its parts."""
        return sum(part.remaining(_in_float(kept)) for part in self.parts)

    def price(self, kept: Mapping[str, str]) -> float:
        """Return what a choice costs."""
        return sum(self.prices[item] for item in _in_float(kept).items())

    def steps(self) -> list[Choice]:
        """Return growing choices, what gains most by its price first; at least one operator is no float."""
        kept: dict[str, str] = {}
        whole = sum(self.prices[name, FLOAT] for name in self.operators) or 1.0
        choices = []
        while (best := self._next(kept, whole)) is not None:
            kept = best
            choices.append(self._choice(kept))
        return choices

    def at_most(self, error: float) -> Choice | None:
        """Return the cheapest choice that leaves no more than some noise; None where that is not found."""
        kept = cheapest(self.parts, self.operators, self.prices, error * (1 + 1e-9))
        return None if kept is None else self._choice(kept)

    def refined(self, step: Choice) -> Choice:
        """Return the cheapest choice that leaves as little noise as a step, or the step."""
        other = self.at_most(self.error(dict(step.kept)))
        return step if other is None or self.price(dict(other.kept)) >= self.price(dict(step.kept)) else other

    def cheaper(self, fails: Choice, keeps: Choice) -> Choice | None:
        """Return a choice that is cheaper than one that keeps the limits, with noise between it and one that fails."""
        most, least = self.error(dict(fails.kept)), self.error(dict(keeps.kept))
        other = self.at_most(math.sqrt(most * least)) if most > least else None
        if other is None or other in (fails, keeps) or self.price(dict(other.kept)) >= self.price(dict(keeps.kept)):
            return None
        return other

    def _choice(self, kept: Mapping[str, str]) -> Choice:
        halves = self.halves
        return Choice(
            tuple((name, HALF if scheme == FLOAT and name in halves else scheme) for name, scheme in kept.items())
        )

    def _next(self, kept: dict[str, str], whole: float) -> dict[str, str] | None:
        left = [part for part in self.parts if not part.is_spared(kept)]
        of_user: dict[str, list[Part]] = {}
        for part in left:
            for name in part.users:
                of_user.setdefault(name, []).append(part)
        ways = [way for part in left for way in self._sparing(part, kept)]
        every = dict.fromkeys(tuple(sorted(way.items())) for way in ways)
        floats = [list((kept | dict(option)).values()).count(FLOAT) for option in every]
        options = [option for option, number in zip(every, floats, strict=True) if number < len(self.operators)]

        def worth(option: Iterable[tuple[str, str]]) -> float:
            chosen = kept | dict(option)
            near = {id(part): part for name, _ in option for part in of_user.get(name, ())}
            gain = sum(part.remaining(kept) - part.remaining(chosen) for part in near.values())
            more = sum(self.prices[n, s] - (self.prices[n, kept[n]] if n in kept else 0) for n, s in option)
            newly = sum(name not in kept for name, _ in option)
            return gain / (more / whole + newly / len(self.operators) + _LEAST_PRICE)

        return kept | dict(max(options, key=worth)) if options else None

    def _sparing(self, part: Part, kept: Mapping[str, str]) -> list[dict[str, str]]:
        """Return the least that has to be in safer schemes for a part to be spared, or a weight to be less in error."""
        if not part.is_weight:
            users = [name for name in part.users if kept.get(name) not in OUT]
            return [{name: STORED if (name, STORED) in self.prices else FLOAT for name in users}]
        (name,) = part.users
        now, safer = part.remaining(kept), _SAFER[_SAFER.index(kept[name]) + 1 if name in kept else 0 :]
        ways = [{name: scheme} for scheme in safer if (name, scheme) in self.prices]
        return [way for way in ways if part.is_spared(way) or part.remaining(way) < now]


def _in_float(kept: Mapping[str, str]) -> dict[str, str]:
    """Return what is kept, with float for what spares weights as float does."""
    return {name: FLOAT if scheme == HALF else scheme for name, scheme in kept.items()}


class Refined(Sequence[Choice]):
    """Steps of a ranking, each as the cheapest choice of as little noise, worked out when it is asked for."""

    def __init__(self, ranked: Relaxations) -> None:
        self._ranked, self._steps = ranked, ranked.steps()
        self._found: dict[int, Choice] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: Any) -> Any:
        if index not in self._found:
            self._found[index] = self._ranked.refined(self._steps[index])
        return self._found[index]


@torch.no_grad()
@exact_arithmetic()
def relaxations(prepared: Prepared, calls: list[Call], *, by_time: bool = False) -> Relaxations:
    """Measure every part of a calibrated module: one run of all calls for each.

    Args:
        prepared: detached and calibrated.
        calls: of the module, best such as no range was learned from.
        by_time: whether what is kept costs time, by its multiply-adds, and not bytes.
    """
    with evaluation_mode(prepared.root):
        exact = [prepared.root(*args, **kwargs) for args, kwargs in calls]

        def error(rounded: frozenset[str], plan: Prepared = prepared) -> float:
            with plan.simulation.quantizing_only(rounded), plan.attached("frozen"):
                return error_of(exact, [prepared.root(*args, **kwargs) for args, kwargs in calls])

        rounded, wide = rounded_in(prepared), in_eight_bits(prepared)

        def left(identities: frozenset[str]) -> dict[str, float]:
            """Return what a weight of fewer bits leaves in eight."""
            if not identities <= wide.weight_quant_maxima.keys():
                return {}
            return dict.fromkeys((WIDE, STORED), error(identities, wide))

        parts = tuple(
            Part(users, is_weight, error(identities), left(identities) if is_weight else {})
            for identities, users, is_weight in tracked(rounded, "Ranking", "part")
        )
        for name, layers in layers_beside(prepared).items():
            with placed(prepared.root, layers):
                noise = error_of(exact, [prepared.root(*args, **kwargs) for args, kwargs in calls])
            parts += (Part(frozenset({name}), True, noise),)
    # In half the bytes, and converted for every call.
    halves = frozenset() if by_time else _layers_in(prepared, HALF)
    operators = names_in_integers(prepared)
    wider = {name for part in parts if WIDE in part.left for name in part.users}
    able = {WIDE: wider, STORED: _layers_in(prepared, STORED), FLOAT: operators}
    return Relaxations(parts, operators, _prices(prepared, able, halves, by_time=by_time), halves)


def layers_beside(prepared: Prepared) -> dict[str, dict[str, nn.Module]]:
    """Return the layers without an integer form in graphs that are stored in integers, by name and then by place.

    Those that the user spoke for are left out, and weights of the module itself, which no override of a plan names.
    """
    layers: dict[str, Any] = prepared.stored_layers()
    places = places_of(prepared.root, layers, prepared.stored_plan(), prepared.recipe.overrides)
    named = dict(prepared.root.named_modules())
    return {name: {place: layers[place] for place in own} for name, own in places.items() if name in named}


def names_in_integers(prepared: Prepared) -> tuple[str, ...]:
    """Return the names of what computes in integers, and of layers that are stored in them."""
    return tuple(dict.fromkeys((*(o.name for o in prepared.operators.values()), *layers_beside(prepared))))


def rounded_in(prepared: Prepared) -> list[tuple[frozenset[str], frozenset[str], bool]]:
    """Return for each part what of it is rounded, the names of its users, and whether it is a weight."""
    candidates = []
    users: dict[str, set[str]] = {}
    for identity, operator in prepared.operators.items():
        if operator.weight:
            candidates.append((frozenset({identity}), frozenset({name_of(prepared, identity)}), True))
        for edge in touched_edges(prepared, identity):
            users.setdefault(prepared.ranges.source(edge), set()).add(name_of(prepared, identity))
    for source, names in users.items():
        edges = frozenset(edge for edge in prepared.ranges.edges if prepared.ranges.source(edge) == source)
        candidates.append((edges, frozenset(names), False))
    return candidates


def _layers_in(prepared: Prepared, recipe: str) -> frozenset[str]:
    """Return the operators that are layers of their own which a recipe of layers stores, near enough to float."""
    if not prepared.runtime.LAYERS_IN_GRAPHS:
        return frozenset()
    modules = dict(prepared.root.named_modules())
    names = [operator.name for operator in prepared.operators.values() if operator.weight]
    names += layers_beside(prepared)
    once = {name for name in names if names.count(name) == 1 and name in modules}
    able = tuple(name for name in once if class_for(modules[name]) is not None)
    if not able:
        return frozenset()
    here = prepared.on_host()
    args, kwargs = here.call()
    where: dict[str, Any] = {"runtime": prepared.plan.runtime, "selection": Selection(include=able)}
    try:
        layerwise = quantize_layers(here.root, args, kwargs, recipe=recipe, **where)
    except QuantizationError:  # The runtime has none, or no layer is near enough.
        return frozenset()
    return frozenset(able) & set(layerwise.layers)


def _prices(
    prepared: Prepared, able: Mapping[str, Collection[str]], halves: frozenset[str], *, by_time: bool
) -> dict[tuple[str, str], float]:
    """Return what each scheme costs of the operators that can have it."""
    options = [(name, scheme) for scheme, names in able.items() for name in names]
    if by_time:
        macs = {row.name: row.macs for row in prepared.plan.rows}
        return {(name, scheme): float(macs.get(name, 0)) * (scheme in OUT) for name, scheme in options}
    beside = layers_beside(prepared)
    # Bytes in integers, and numbers that are stored.
    stored = {row.name: (float(row.weights), row.weights) for row in prepared.plan.rows if row.name in beside}
    for identity, operator in prepared.operators.items():
        if operator.weight:
            number = prepared.weight(identity).numel()
            stored[operator.name] = number * bytes_of_value(prepared, identity), number
    each = {WIDE: 1.0, STORED: 1.0, FLOAT: 4.0}
    prices = {}
    for name, scheme in options:
        own, number = stored.get(name, (0.0, 0))
        size = 2.0 if scheme == FLOAT and name in halves else each[scheme]
        prices[name, scheme] = size * number - own
    return prices
