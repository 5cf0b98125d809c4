"""The cheapest safer schemes of operators that leave no more than some noise: a small integer program.

Source: scipy.optimize.milp, which solves it exactly by branch and cut (HiGHS), and the same on every machine.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_quant.search.choice import FLOAT, OUT

# Share of the price of everything that one operator more in a safer scheme counts, so that of equal sets the smaller is
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
        left: of a weight, scheme of its user to the error that it leaves; float leaves none.
    """

    users: frozenset[str]
    is_weight: bool
    error: float
    left: Mapping[str, float] = field(default_factory=dict)

    def is_spared(self, kept: Mapping[str, str]) -> bool:
        """Tell whether nothing needs it rounded any more, with some operators kept in safer schemes."""
        return all(kept.get(name) in ((FLOAT,) if self.is_weight else OUT) for name in self.users)

    def remaining(self, kept: Mapping[str, str]) -> float:
        """Return the error that is left with some operators kept in safer schemes."""
        if self.is_spared(kept):
            return 0.0
        return min([self.left[kept[name]] for name in self.users if kept.get(name) in self.left] or [self.error])


def cheapest(
    parts: Sequence[Part], operators: Sequence[str], prices: Mapping[tuple[str, str], float], allowed: float
) -> dict[str, str] | None:
    """Return operator to scheme at the lowest price such that the errors that are left add up to no more than allowed.

    An operator has one safer scheme, or none. What is spared of a tensor is at most what each of its users allows.

    Args:
        parts: all that is rounded.
        operators: names; at least one is not float.
        prices: name and scheme to price, of all schemes that an operator may have.
        allowed: error that may be left.

    Returns:
        None where nothing leaves so little, or the solver has no answer in time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    least = sum(part.error for part in parts) - allowed
    if least <= 0:
        return {}
    options = list(prices)
    whole = sum(prices[name, FLOAT] for name in operators) or 1.0
    tensors = [part for part in parts if part.error > 0 and not part.is_weight]
    cost = [prices[option] / whole + _TIE for option in options] + [0.0] * len(tensors)
    rows = _constraints(parts, tensors, operators, options, least)
    matrix = np.zeros((len(rows), len(cost)))
    for index, (entries, _, _) in enumerate(rows):
        matrix[index, list(entries)] = list(entries.values())
    constraints = LinearConstraint(matrix, np.array([row[1] for row in rows]), np.array([row[2] for row in rows]))
    whole_numbers = np.array([1] * len(options) + [0] * len(tensors))
    limit = {"time_limit": _SECONDS}
    solution = milp(cost, integrality=whole_numbers, bounds=Bounds(0, 1), constraints=constraints, options=limit)
    if solution.x is None:
        return None
    return {name: scheme for at, (name, scheme) in enumerate(options) if solution.x[at] > 0.5}


def _constraints(
    parts: Sequence[Part],
    tensors: Sequence[Part],
    operators: Sequence[str],
    options: Sequence[tuple[str, str]],
    least: float,
) -> list[tuple[dict[int, float], float, float]]:
    """Return rows of factors, lowest and highest sum: of the options, then of the tensors that are spared."""
    places: dict[str, dict[str, int]] = {name: {} for name in operators}
    for at, (name, scheme) in enumerate(options):
        places[name][scheme] = at
    rows: list[tuple[dict[int, float], float, float]] = [
        (dict.fromkeys(schemes.values(), 1.0), 0.0, 1.0) for schemes in places.values()
    ]
    gains: dict[int, float] = {}
    for index, part in enumerate(tensors, len(options)):
        gains[index] = part.error
        for name in part.users:
            out = [at for scheme, at in places[name].items() if scheme in OUT]
            rows.append(({index: 1.0, **dict.fromkeys(out, -1.0)}, -math.inf, 0.0))
    for part in parts:
        for name in part.users if part.is_weight else ():
            for scheme, at in places[name].items():
                gains[at] = gains.get(at, 0.0) + part.error - part.remaining({name: scheme})
    rows.append(({at: gain / least for at, gain in gains.items()}, 1.0, math.inf))
    rows.append(({places[name][FLOAT]: 1.0 for name in operators}, 0.0, len(operators) - 1.0))
    return rows
