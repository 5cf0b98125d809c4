"""Whose multiply-adds are whose: each one of a call belongs to one row of the plan, also where no layer makes it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx, nn

from lightning_quant.graph.counting import ObservedCall
from lightning_quant.graph.plan import Row, join

_NO_LAYER = "read by code of its own, not by a layer"
_UNCLAIMED = "computed by code around the layers, which stays as it is"
# What PyTorch's dispatcher calls the operators that carry out products with a weight.
_WITH_WEIGHTS = ("addmm", "mm", "linear", "convolution")


@dataclass(frozen=True)
class Claim:
    """A row of a plan, and what of a call it answers for.

    Attributes:
        row: with the multiply-adds of one call at the traced shapes, as far as they are known.
        place: path of the module whose code computes it.
        extent: "operator", one in the module's forward; "layer", what the module computes itself; or "whole", also
            what modules inside it compute that no other row answers for.
        graph: path of the graph that an operator belongs to, which the call may run several times.
        apart: multiply-adds of a whole module that have nothing to do with its weights.
        weights: qualified names of the weights that an operator reads, or that what it reads is computed from.
    """

    row: Row
    place: str
    extent: Literal["operator", "layer", "whole"]
    graph: str = ""
    apart: int = 0
    weights: tuple[str, ...] = ()


def claim_of(node: fx.Node, row: Row, path: str, weights: tuple[str, ...] = ()) -> Claim:
    """Return what a node of a graph answers for.

    Args:
        node: with its place in the user's code.
        row: the plan's row for it.
        path: of the graph.
        weights: qualified names of the weights that it reads, in the graph.
    """
    row = replace(row, macs=node.meta.get("multiply_adds", 0))
    if node.op == "call_module":
        return Claim(row, join(path, str(node.target)), "layer" if row.is_quantized else "whole", path)
    return Claim(
        row, join(path, node.meta.get("scope", "")), "operator", path, weights=tuple(join(path, w) for w in weights)
    )


def settle(claims: list[Claim], observed: ObservedCall) -> list[Row]:
    """Return the rows with what they make of the observed call, and a row for each place that makes more.

    Operators get what they make at the traced shapes, as often as their graph runs, and no more than was counted.
    """
    left = {place: dict(operators) for place, operators in observed.multiply_adds.items()}
    macs = [0] * len(claims)

    def give(indices: list[int], wanted: list[int], place: str, amount: int) -> None:
        for index, share in zip(indices, _shares(wanted, amount), strict=True):
            macs[index] += share
            _take(left.get(place, {}), claims[index].row.kind, share)

    for place, indices in _by_place(claims, "operator"):
        wanted = [claims[i].row.macs * max(1, observed.times.get(claims[i].graph, 1)) for i in indices]
        give(indices, wanted, place, min(sum(wanted), _total(left, place)))
    for place, indices in _by_place(claims, "layer"):
        give(indices, [claims[i].row.macs or 1 for i in indices], place, _total(left, place))
    wholes = dict(_by_place(claims, "whole"))
    for place in left:
        owner = next((outer for outer in _outwards(place) if outer in wholes), None)
        if owner is not None:
            apart = sum(claims[i].apart for i in wholes[owner]) if place == owner else 0
            indices = wholes[owner]
            give(indices, [claims[i].row.macs or 1 for i in indices], place, max(0, _total(left, place) - apart))
    rows = [replace(claim.row, macs=number) for claim, number in zip(claims, macs, strict=True)]
    return rows + [_unclaimed(place, operators) for place, operators in left.items() if sum(operators.values())]


def weigh(root: nn.Module, claims: list[Claim], rows: list[Row]) -> list[Row]:
    """Return the rows with the values of their weights, and a row for each weight that none of them has.

    Args:
        root: the module.
        claims: what rows answer for.
        rows: those of the claims, in their order, and others.
    """
    readers = {name: index for index, claim in _float_last(claims) for name in claim.weights}
    modules = {claim.place: index for index, claim in _float_last(claims) if claim.extent != "operator"}
    names: dict[int, list[str]] = {}
    parameters = dict(root.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if parameter.dim() > 1:
            names.setdefault(id(parameter), []).append(name)
    weighed = list(rows)
    for own in names.values():
        read = [name if name in readers else _made_of(name) for name in own]
        owners = [readers[name] if name in readers else _owner(name, modules) for name in read]
        known = sorted((index for index in owners if index is not None), key=lambda i: claims[i].row.action != "float")
        number = parameters[own[0]].numel()
        if known:
            weighed[known[0]] = replace(weighed[known[0]], weights=weighed[known[0]].weights + number)
        else:
            weighed.append(Row(own[0], "Parameter", "float", _NO_LAYER, weights=number))
    return weighed


def _made_of(name: str) -> str:
    """Return the name of the weight that a parameter is for, where a parametrization or weight norm makes one of it."""
    layer, parametrized, rest = name.rpartition("parametrizations.")
    if parametrized:
        return layer + rest.partition(".")[0]
    owner, _, own = name.rpartition(".")
    return join(owner, "weight") if own in ("weight_g", "weight_v", "weight_orig") else name


def _owner(name: str, modules: dict[str, int]) -> int | None:
    return next((modules[outer] for outer in _outwards(name.rpartition(".")[0]) if outer in modules), None)


def _float_last(claims: list[Claim]) -> list[tuple[int, Claim]]:
    return sorted(enumerate(claims), key=lambda item: item[1].row.action == "float")


def _by_place(claims: list[Claim], extent: str) -> Iterator[tuple[str, list[int]]]:
    places: dict[str, list[int]] = {}
    for index, claim in enumerate(claims):
        if claim.extent == extent:
            places.setdefault(claim.place, []).append(index)
    return iter(places.items())


def _total(left: dict[str, dict[str, int]], place: str) -> int:
    return sum(left.get(place, {}).values())


def _shares(wanted: list[int], amount: int) -> list[int]:
    """Divide an amount in proportion to what is wanted, to the last one."""
    total, given, shares = sum(wanted), 0, []
    so_far = 0
    for number in wanted:
        so_far += number
        upto = amount * so_far // total if total else 0
        shares.append(upto - given)
        given = upto
    return shares


def _take(operators: dict[str, int], kind: str, amount: int) -> None:
    """Take multiply-adds from those of a place, from operators with weights first unless the kind is one without."""
    weights_last = kind in ("matmul", "attention", "scaled_dot_product_attention", "einsum", "bmm")
    for operator in sorted(operators, key=lambda name: (name in _WITH_WEIGHTS) == weights_last):
        taken = min(amount, operators[operator])
        operators[operator] -= taken
        amount -= taken


def _outwards(place: str) -> Iterator[str]:
    """Yield a path and those of the modules around it, the root last."""
    while place:
        yield place
        place = place.rpartition(".")[0]
    yield ""


def _unclaimed(place: str, operators: dict[str, int]) -> Row:
    kinds = sorted(name for name, number in operators.items() if number)
    return Row(join(place, "+".join(kinds)), ", ".join(kinds), "float", _UNCLAIMED, sum(operators.values()))
