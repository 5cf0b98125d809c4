"""Which operators are slower in integers than in float here: each part is timed in whole files, with its transitions.

What a part costs depends on its neighbours, since a tensor between integers and float is quantized or dequantized. So
files are timed, and no sum of operators: with a half of the operators in float, then with halves of that, and at last
with single ones back in integers.
"""

import collections
from collections.abc import Callable, Sequence

from lightning_quant.errors import QuantizationError
from lightning_quant.graph.plan import Plan
from lightning_quant.search.choice import FLOAT, Choice

# Share by which a file must be quicker to be no chance of the clock, and files that are timed at most.
GAIN, MOST = 0.02, 32


def quicker(operators: Sequence[str], base: Choice, ratio: Callable[[Choice, Choice], float]) -> Choice:
    """Return the quickest choice that was found, with more of its operators in float, or the base itself.

    Args:
        operators: names of all that run in integers in the whole recipe, in their order.
        base: what is already kept.
        ratio: gives the time of one choice's file by that of another's, both timed in turn.
    """
    best, left = base, MOST
    parts = collections.deque([[name for name in operators if name not in dict(base.kept)]])
    while parts and left:
        part, left = parts.popleft(), left - 1
        if _is_quicker(candidate := floating(best, part), best, ratio):
            best = candidate
        elif len(part) > 1:
            parts += [part[: len(part) // 2], part[len(part) // 2 :]]
    # What a half had to take with it goes back.
    added = [name for name in operators if name in dict(best.kept) and name not in dict(base.kept)]
    for name in added[:left]:
        candidate = Choice(tuple(item for item in best.kept if item[0] != name), best.accurate)
        if _is_quicker(candidate, best, ratio):
            best = candidate
    return best


def floating(choice: Choice, names: Sequence[str]) -> Choice:
    """Return a choice that keeps these operators in float, too."""
    return Choice(tuple({**dict(choice.kept), **dict.fromkeys(names, FLOAT)}.items()), choice.accurate)


def transitions(plan: Plan) -> int:
    """Return how many tensors a plan quantizes for integers, or dequantizes for float, the module's own among them."""
    owners = {row.name: row.reason.removeprefix("into ") if row.action == "fused" else row.name for row in plan.rows}
    for name in owners:
        while owners.get(owners[name], owners[name]) != owners[name]:
            owners[name] = owners[owners[name]]
    kinds = {row.name: row.action != "float" for row in plan.rows if row.action != "fused"}
    pairs = {(owners.get(read, ""), owners[row.name]) for row in plan.rows for read in row.reads}
    between = {(one, other) for one, other in pairs if one != other}
    crossing = {one for one, other in between if kinds.get(one, False) != kinds.get(other, False)} - {""}
    first = {name for name, in_integers in kinds.items() if in_integers and all(b != name for _, b in between)}
    last = {name for name, in_integers in kinds.items() if in_integers and all(a != name for a, _ in between)}
    return len(crossing) + len(first) + len(last)


def _is_quicker(candidate: Choice, best: Choice, ratio: Callable[[Choice, Choice], float]) -> bool:
    try:
        return ratio(candidate, best) < 1 - GAIN
    except QuantizationError:  # Some operators cannot be kept in float without others.
        return False
