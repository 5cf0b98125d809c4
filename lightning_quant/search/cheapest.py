"""The cheapest set of operators to keep out of integers that leaves no more than some noise: a small integer program.

Source: scipy.optimize.milp, which solves it exactly by branch and cut (HiGHS), and the same on every machine.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_quant.search.choice import FLOAT, STORED

# Share of the price of everything that one operator more out of integers counts, so that of equal sets the smaller is
# taken.
_TIE = 1e-4
_SECONDS = 10.0


@dataclass(frozen=True)
class Part:
    """Something that is rounded.

    Attributes:
        users: names of the operators that need it so.
        is_weight: whether it is the weight of the one user.
        error: noise over signal power of the module's output with nothing else rounded.
    """

    users: frozenset[str]
    is_weight: bool
    error: float


def cheapest(
    parts: Sequence[Part],
    operators: Sequence[str],
    stored: frozenset[str],
    prices: Mapping[tuple[str, str], float],
    allowed: float,
) -> dict[str, str] | None:
    """Return operator to scheme at the lowest price such that the errors that are left add up to no more than allowed.

    An operator is out of integers (`out`), and then its weight float (`floating`) or stored. What is spared of a part
    is at most what each of its users allows.

    Args:
        parts: all that is rounded.
        operators: names; at least one computes in integers, or is stored in them.
        stored: names of those that may be stored.
        prices: name and scheme to price.
        allowed: error that may be left.

    Returns:
        None where nothing leaves so little, or the solver has no answer in time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    spared = [part for part in parts if part.error > 0]
    least = sum(part.error for part in spared) - allowed
    if least <= 0:
        return {}
    number, places = len(operators), {name: place for place, name in enumerate(operators)}
    whole = sum(prices[name, FLOAT] for name in operators) or 1.0
    cost = np.zeros(2 * number + len(spared))
    for name, place in places.items():
        base = prices[name, STORED] if name in stored else 0.0
        cost[place] = base / whole + _TIE
        cost[number + place] = (prices[name, FLOAT] - base) / whole
    rows = _constraints(spared, places, stored, least)
    matrix = np.zeros((len(rows), len(cost)))
    for index, (entries, _, _) in enumerate(rows):
        matrix[index, list(entries)] = list(entries.values())
    constraints = LinearConstraint(matrix, np.array([row[1] for row in rows]), np.array([row[2] for row in rows]))
    whole_numbers = np.array([1] * 2 * number + [0] * len(spared))
    options = {"time_limit": _SECONDS}
    solution = milp(cost, integrality=whole_numbers, bounds=Bounds(0, 1), constraints=constraints, options=options)
    if solution.x is None:
        return None
    chosen = solution.x > 0.5
    out = {name: place for name, place in places.items() if chosen[place]}
    return {name: FLOAT if chosen[number + at] or name not in stored else STORED for name, at in out.items()}


def _constraints(
    spared: Sequence[Part], places: Mapping[str, int], stored: frozenset[str], least: float
) -> list[tuple[dict[int, float], float, float]]:
    """Return rows of factors, lowest and highest sum: of what is out, then what is float, then what is spared."""
    number = len(places)
    # Float weights are those of operators that are out, and of all of these that cannot be stored.
    rows: list[tuple[dict[int, float], float, float]] = [
        ({number + place: 1.0, place: -1.0}, -1.0 if name in stored else 0.0, 0.0) for name, place in places.items()
    ]
    for index, part in enumerate(spared):
        start = number if part.is_weight else 0
        rows += [({2 * number + index: 1.0, start + places[name]: -1.0}, -math.inf, 0.0) for name in part.users]
    rows.append(({2 * number + index: part.error / least for index, part in enumerate(spared)}, 1.0, math.inf))
    rows.append((dict.fromkeys(range(number, 2 * number), 1.0), 0.0, number - 1.0))
    return rows
