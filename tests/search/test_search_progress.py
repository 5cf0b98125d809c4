import pytest

from lightning_quant.measure.contributions import Difference
from lightning_quant.search.choice import FLOAT, Choice, Measured, Trial, Verdict
from lightning_quant.search.progress import Budget, SearchRecord, SpentError


def trial(name: str, size: int, kept: bool, share: float = 1.0, reached: float = 0.2) -> Trial:
    measured = Measured({"m": 0.5}, {"m": Difference(-0.1)}, size, 0.3, share=share)
    verdict = Verdict("m", 0.1, reached, 0.1, kept, on_metric=True)
    return Trial(Choice(((name, FLOAT),)), measured, (verdict,), 1.0, validations=share)


def test_a_budget_is_spent_by_what_was_read_of_the_data() -> None:
    budget = Budget.of(3, None)
    assert budget.has_left(2.0)
    assert not budget.has_left(2.25)
    budget.check(1.875)
    with pytest.raises(SpentError, match="validations spent, 3"):
        budget.check(2.125)
    with pytest.raises(SpentError, match="time budget"):
        Budget.of(None, -1.0).check(0.0)


def test_the_best_is_the_cheapest_that_keeps_the_limits_and_else_what_misses_least() -> None:
    trials = [trial("a", 30, True), trial("b", 20, True, 0.25), trial("c", 10, False), trial("d", 5, False, 1.0, 0.15)]
    record = SearchRecord(trials)
    assert record.best("size", {}.get) == trials[1]
    record.is_over = True
    assert record.best("size", {}.get) == trials[0]
    record.trials = trials[1:]
    assert record.best("size", {}.get) == trials[1]
    record.trials, record.is_over = trials, False
    assert not trials[1].is_whole
    assert record.validations == 3.25
    assert SearchRecord(trials[2:]).best("size", {}.get) == trials[3]
    assert SearchRecord(ended="spent").nothing == "the search tried no file: spent"
