import itertools
import random

from lightning_quant.search.cheapest import Part, cheapest
from lightning_quant.search.choice import FLOAT, STORED
from lightning_quant.search.relaxations import Relaxations


def made_up(seed: int) -> Relaxations:
    generator = random.Random(seed)
    names = tuple("abcde")
    stored = frozenset(generator.sample(names, 3))
    weights = [Part(frozenset({n}), is_weight=True, error=generator.random()) for n in names]
    edges = [Part(frozenset(pair), is_weight=False, error=generator.random()) for pair in itertools.pairwise(names)]
    prices = {(n, FLOAT): float(generator.randint(1, 50)) for n in names} | {(n, STORED): 0.0 for n in names}
    return Relaxations((*weights, *edges), names, stored, prices)


def test_it_is_the_cheapest_of_all_choices() -> None:
    for seed in range(6):
        space = made_up(seed)
        schemes = [(None, FLOAT, *([STORED] if n in space.stored else [])) for n in space.operators]
        every = [
            {n: s for n, s in zip(space.operators, picked, strict=True) if s} for picked in itertools.product(*schemes)
        ]
        every = [kept for kept in every if list(kept.values()).count(FLOAT) < 5]
        for share in (0.3, 0.6, 0.9):
            allowed = share * space.error({})
            found = cheapest(space.parts, space.operators, space.stored, space.prices, allowed)
            best = min((space.price(kept) for kept in every if space.error(kept) <= allowed), default=None)
            assert (found is None) == (best is None)
            if found is not None and best is not None:
                assert space.error(found) <= allowed * (1 + 1e-6)
                assert space.price(found) <= best + 0.05


def test_what_is_allowed_anyway_costs_nothing() -> None:
    space = made_up(0)
    assert cheapest(space.parts, space.operators, space.stored, space.prices, space.error({})) == {}
    assert cheapest(space.parts, space.operators, space.stored, space.prices, 0.0) is None
