import itertools
import random

from lightning_quant.search.cheapest import Part, cheapest
from lightning_quant.search.choice import FLOAT, STORED, WIDE
from lightning_quant.search.relaxations import Relaxations


def made_up(seed: int) -> Relaxations:
    generator = random.Random(seed)
    names = tuple("abcde")
    stored, wide = generator.sample(names, 3), generator.sample(names, 3)
    weights = []
    for name in names:
        error = generator.random()
        left = dict.fromkeys((WIDE, STORED), error / 10) if name in wide else {}
        weights.append(Part(frozenset({name}), is_weight=True, error=error, left=left))
    edges = [Part(frozenset(pair), is_weight=False, error=generator.random()) for pair in itertools.pairwise(names)]
    prices = {(n, FLOAT): float(generator.randint(11, 60)) for n in names}
    prices |= {(n, STORED): 10.0 * (n in wide) for n in stored} | {(n, WIDE): 10.0 for n in wide}
    return Relaxations((*weights, *edges), names, prices)


def test_it_is_the_cheapest_of_all_choices() -> None:
    schemes_of = (None, WIDE, STORED, FLOAT)
    for seed in range(6):
        space = made_up(seed)
        schemes = [[s for s in schemes_of if s is None or (n, s) in space.prices] for n in space.operators]
        every = [
            {n: s for n, s in zip(space.operators, picked, strict=True) if s} for picked in itertools.product(*schemes)
        ]
        every = [kept for kept in every if list(kept.values()).count(FLOAT) < 5]
        for share in (0.1, 0.3, 0.6, 0.9):
            allowed = share * space.error({})
            found = cheapest(space.parts, space.operators, space.prices, allowed)
            best = min((space.price(kept) for kept in every if space.error(kept) <= allowed), default=None)
            assert (found is None) == (best is None)
            if found is not None and best is not None:
                assert space.error(found) <= allowed * (1 + 1e-6)
                assert space.price(found) <= best + 0.1


def test_what_is_allowed_anyway_costs_nothing() -> None:
    space = made_up(0)
    assert cheapest(space.parts, space.operators, space.prices, space.error({})) == {}
    assert cheapest(space.parts, space.operators, space.prices, 0.0) is None


def test_steps_go_through_eight_bits_before_float() -> None:
    part = Part(frozenset("a"), is_weight=True, error=1.0, left={WIDE: 0.01})
    other = Part(frozenset("b"), is_weight=True, error=0.001)
    prices = {("a", WIDE): 5.0, ("a", FLOAT): 35.0, ("b", FLOAT): 35.0}
    space = Relaxations((part, other), ("a", "b"), prices)
    assert [dict(step.kept) for step in space.steps()] == [{"a": WIDE}, {"a": FLOAT}]
    assert cheapest(space.parts, space.operators, prices, 0.02) == {"a": WIDE}
    assert cheapest(space.parts, space.operators, prices, 0.002) == {"a": FLOAT}
