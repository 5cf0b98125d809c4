import math

from lightning_quant.measure.contributions import Difference
from lightning_quant.search.choice import FLOAT, STORED, Choice, Measured, Trial, Verdict

MEASURED = Measured({"m": 1.0}, {"m": Difference(0.0)}, 1, 0.5)


def verdict(reached: float | None, *, kept: bool) -> Verdict:
    return Verdict("m", 0.1, reached, reached, kept, on_metric=True)


def test_a_choice_reads_as_what_it_keeps() -> None:
    assert str(Choice()) == "the whole recipe"
    assert str(Choice((("a", FLOAT), ("b", STORED)))) == "a (float), b (int8_weight_only) kept safer"
    assert str(Choice(tuple((name, FLOAT) for name in "abcde"))) == "a, b, c and 2 more kept float"


def test_fewer_and_smaller_misses_are_better() -> None:
    near, far = (Trial(Choice(), MEASURED, (verdict(r, kept=False),), 0.0) for r in (0.15, 0.3))
    both = Trial(Choice(), MEASURED, (verdict(0.11, kept=False), verdict(0.11, kept=False)), 0.0)
    none = Trial(Choice(), None, (), 0.0, "no file")
    kept = Trial(Choice(), MEASURED, (verdict(0.05, kept=True),), 0.0)
    assert kept.misses < near.misses < far.misses < both.misses < none.misses
    assert not none.keeps_all
    assert verdict(None, kept=False).miss == math.inf
