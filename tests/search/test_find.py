import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from lightning_quant.errors import ExportError
from lightning_quant.measure.contributions import Difference, Metrics, differences, of_samples
from lightning_quant.measure.interim import Interim
from lightning_quant.report.limits import Limits
from lightning_quant.search.cheapest import Part
from lightning_quant.search.choice import FLOAT, Choice, Measured
from lightning_quant.search.find import Space, find
from lightning_quant.search.judge import Judge
from lightning_quant.search.progress import Budget, SearchRecord
from lightning_quant.search.relaxations import Refined, Relaxations
from lightning_quant.search.section import SearchSection


@dataclass
class Simulated:
    """A space of operators whose weights each cost a known part of accuracy, and bytes of their own."""

    errors: dict[str, float]
    sizes: dict[str, float]
    ranked: Relaxations = field(init=False)
    tried: list[Choice] = field(default_factory=list)
    fails: Choice | None = None
    breaks_after: int = 10**9
    stops_after: int = 10**9
    may_be_float: bool = False

    def __post_init__(self) -> None:
        parts = tuple(Part(frozenset({name}), is_weight=True, error=error) for name, error in self.errors.items())
        prices = {(name, FLOAT): size for name, size in self.sizes.items()}
        self.ranked = Relaxations(parts, tuple(self.errors), prices)

    def measure(self, choice: Choice, decides: Any = None) -> Measured:
        if len(self.tried) == self.stops_after:
            raise KeyboardInterrupt
        if len(self.tried) == self.breaks_after:
            raise RuntimeError("out of memory")
        self.tried.append(choice)
        if choice == self.fails:
            raise ExportError("no file")
        drop = sum(error for name, error in self.errors.items() if name not in dict(choice.kept))
        size = round(100 + sum(self.sizes[name] for name, _ in choice.kept))
        return Measured({"acc": 1 - drop}, {"acc": Difference(-drop)}, size, size / 1000)

    def accurate(self) -> Choice | None:
        return None

    def steps(self) -> Sequence[Choice]:
        return Refined(self.ranked)

    def cheaper(self, fails: Choice, keeps: Choice) -> Choice | None:
        return self.ranked.cheaper(fails, keeps)

    def quicker(self, base: Choice) -> Choice | None:
        return None

    def all_float(self) -> Choice | None:
        return Choice(tuple((name, FLOAT) for name in self.errors)) if self.may_be_float else None

    def times(self, choices: Sequence[Choice]) -> list[float]:
        return [1.0] * len(choices)


def simulated(number: int, seed: int = 0) -> Simulated:
    generator = random.Random(seed)
    errors = {f"layer{i}": generator.random() ** 4 / number for i in range(number)}
    return Simulated(errors, {name: generator.choice([1, 10, 100]) for name in errors})


def judge(**limits: float) -> Judge:
    return Judge(Limits({"acc": limits.pop("acc", 0.01)}, **limits), {"acc": True})  # type: ignore[arg-type]


def test_where_the_whole_recipe_keeps_the_limits_one_validation_is_all() -> None:
    space = simulated(30)
    found = find(space, judge(acc=0.5))
    assert [trial.choice for trial in found.trials] == [Choice()]
    assert found.num_steps == 0


@pytest.mark.parametrize("number", [2, 3, 7, 16, 33])
@pytest.mark.parametrize("allowed", [0.0, 0.001, 0.01, 0.05])
def test_as_few_are_kept_float_as_the_limit_asks_for_in_a_logarithm_of_validations(number: int, allowed: float) -> None:
    space = simulated(number)
    found = find(space, judge(acc=allowed))
    assert len(found.trials) <= math.ceil(math.log2(number)) + 3
    best = found.best("size", {"acc": True}.get)
    assert best is not None
    keeping = [c for c in (Choice(), *space.steps()) if space.measure(c).differences["acc"].value >= -allowed]
    assert best.keeps_all == bool(keeping)
    if best.keeps_all:
        assert best.measured is not None
        assert best.measured.size_bytes <= space.measure(keeping[0]).size_bytes


def test_what_is_found_is_near_the_best_of_all_subsets() -> None:
    for seed in range(5):
        space = simulated(10, seed)
        best = find(space, judge(acc=0.02)).best("size", {"acc": True}.get)
        assert best is not None
        assert best.measured is not None
        names = list(space.errors)
        subsets = [Choice(tuple((n, FLOAT) for i, n in enumerate(names) if mask >> i & 1)) for mask in range(2**10)]
        every = [m for m in map(space.measure, subsets) if m.differences["acc"].value >= -0.02]
        assert best.measured.size_bytes <= 1.05 * min(m.size_bytes for m in every)


def test_a_metric_as_objective_takes_as_much_float_as_the_bytes_allow() -> None:
    space = simulated(20)
    found = find(space, judge(acc=1.0, max_size_ratio=0.3), "acc")
    best = found.best("acc", {"acc": True}.get)
    assert best is not None
    assert best.measured is not None
    keeping = [m for m in map(space.measure, space.steps()) if m.size_ratio <= 0.3]
    assert best.measured.metrics["acc"] == max(m.metrics["acc"] for m in keeping)


def test_a_spent_budget_leaves_the_best_so_far() -> None:
    found = find(simulated(50), judge(acc=0.001), budget=Budget(max_validations=3))
    assert len(found.trials) == 3
    assert found.ended == "its budget of validations spent, 3"
    best = found.best("size", {"acc": True}.get)
    assert best is not None
    assert best.misses == min(trial.misses for trial in found.trials if not trial.keeps_all) or best.keeps_all
    over = find(simulated(50), judge(acc=0.001), budget=Budget(deadline=-1.0))
    assert (over.trials, over.ended) == ([], "its time budget spent")


def test_an_interrupted_search_goes_on_where_it_was() -> None:
    space = simulated(40)
    space.stops_after = 3
    found = find(space, judge(acc=0.002))
    assert found.ended == "an interruption"
    assert len(found.trials) == 3
    again = simulated(40)
    resumed = find(again, judge(acc=0.002), record=SearchRecord(list(found.trials)))
    whole = find(simulated(40), judge(acc=0.002))
    assert [t.choice for t in resumed.trials] == [t.choice for t in whole.trials]
    assert len(again.tried) == len(whole.trials) - 3


def test_a_file_that_cannot_be_made_is_a_trial_that_keeps_nothing() -> None:
    space: Simulated = simulated(4)
    space.fails = Choice()
    found = find(space, judge(acc=0.5))
    assert found.trials[0].error == "no file"
    best = found.best("size", {"acc": True}.get)
    assert best is not None
    assert best.keeps_all


@pytest.mark.parametrize("number", [0, 1, 3])
def test_whatever_fails_costs_nothing_that_was_found(number: int) -> None:
    space = simulated(20)
    space.breaks_after = number
    found = find(space, judge(acc=1e-4))

    assert (len(found.trials), found.failed) == (number, True)
    assert "out of memory" in found.ended
    best = found.best("size", {"acc": True}.get)
    assert (best is None) == (number == 0)
    if best is None:
        assert "tried no file: an error: RuntimeError('out of memory')" in found.nothing
    else:
        assert "out of memory" in SearchSection("size", found, best).warnings()[0]


def test_a_simulated_space_is_one() -> None:
    space: Space = simulated(2)
    assert space.accurate() is None


@pytest.mark.parametrize("number", [2, 3, 5, 8, 9])
def test_everything_in_float_is_what_keeps_a_limit_that_nothing_else_does(number: int) -> None:
    space = simulated(number)
    space.may_be_float = True
    search = find(space, judge(acc=0.0))
    assert search.ended == "nothing in integers that keeps the limits on metrics"
    assert len(search.trials) <= math.ceil(math.log2(number)) + 3
    best = search.best("size", {"acc": True}.get)
    assert best is not None
    assert best.keeps_all
    assert len(best.choice.kept) == number


@dataclass
class Sampled(Simulated):
    """Accuracy is that of samples, of which each operator in integers spoils its own share."""

    number: int = 400
    draw: int = 0
    misleading: bool = False

    def spoiled(self, choice: Choice) -> list[bool]:
        generator = random.Random(self.draw)
        drop = sum(error for name, error in self.errors.items() if name not in dict(choice.kept))
        spoiled = [generator.random() < drop for _ in range(self.number)]
        # All that is bad comes last, as in data that are sorted.
        return sorted(spoiled) if self.misleading else spoiled

    def measure(self, choice: Choice, decides: Any = None) -> Measured:
        right = [1.0 - spoiled for spoiled in self.spoiled(choice)]
        floating = Metrics({"acc": 1.0}, contributions={"acc": of_samples([1.0] * self.number)})
        metrics, share = Metrics({"acc": sum(right) / self.number}, contributions={"acc": of_samples(right)}), 1.0
        if decides is not None:
            interim = Interim(floating, decides, range(self.number))
            for seen in range(1, self.number + 1):
                if interim.look(seen, lambda seen=seen: {"acc": of_samples(right[:seen])}):
                    assert interim.metrics is not None
                    metrics, floating, share = interim.metrics, interim.metrics.floating, interim.metrics.share
                    break
        size = round(100 + sum(self.sizes[name] for name, _ in choice.kept))
        return Measured(dict(metrics), differences(metrics, floating), size, size / 1000, share=share)


def sampled(draw: int, **options: Any) -> Sampled:
    generator = random.Random(1000 + draw)
    errors = {f"layer{i}": generator.choice([0.001, 0.01, 0.03, 0.2]) for i in range(12)}
    return Sampled(errors, dict.fromkeys(errors, 10.0), draw=draw, **options)


def test_validations_end_early_where_a_part_decides_and_what_is_taken_is_validated_whole() -> None:
    space = sampled(0)
    search = find(space, judge(acc=0.05))
    assert search.trials[0].measured is not None
    assert (search.trials[0].measured.share, search.trials[0].validations) == (0.125, 0.125)
    assert "12.5% of the validation data" in search.trials[0].verdicts[0].basis
    assert search.validations < len(search.trials)
    best = search.best("size", {"acc": True}.get)
    assert best is not None
    assert best.is_whole
    assert best.keeps_all
    # No metric objective compares what was seen of different parts.
    assert all(trial.is_whole for trial in find(space, judge(acc=0.05, max_size_ratio=0.15), "acc").trials)


def test_what_a_part_promised_and_all_data_do_not_keep_is_not_taken() -> None:
    space = sampled(1, misleading=True)
    search = find(space, judge(acc=0.05))
    best = search.best("size", {"acc": True}.get)
    assert best is not None
    assert best.is_whole
    assert sum(space.spoiled(best.choice)) / space.number <= 0.05
    # It was looked at again, on all data.
    assert any(trial.validations > 1 and not trial.keeps_all for trial in search.trials)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 8])
def test_a_budget_of_validations_is_one_of_readings_of_the_data(number: int) -> None:
    for draw in range(3):
        search = find(sampled(draw), judge(acc=0.05), budget=Budget(number))
        assert search.validations <= number
        best = search.best("size", {"acc": True}.get)
        assert best is not None
        assert best.is_whole


@pytest.mark.parametrize("number", range(1, 8))
def test_a_search_that_time_ends_validates_once_more_at_most(number: int) -> None:
    space, calls = sampled(1), list[bool]()

    class Late(Budget):
        @property
        def is_late(self) -> bool:
            return len(calls) >= number

    class Counted(Sampled):
        def measure(self, choice: Choice, decides: Any = None) -> Measured:
            calls.append(decides is None)
            return super().measure(choice, decides)

    space = Counted(space.errors, space.sizes, draw=1, misleading=True)
    search = find(space, judge(acc=0.05), budget=Late())
    assert len(calls) <= number + 1
    assert calls[number:] in ([], [True])
    best = search.best("size", {"acc": True}.get)
    assert best is not None
    # What a part promised is taken where nothing keeps the limit on all data.
    assert best.is_whole or not any(trial.keeps_all and trial.is_whole for trial in search.trials)


@pytest.mark.slow
def test_the_promise_of_intervals_holds_where_validations_end_early() -> None:
    wrong, spent, whole, seen = 0, 0.0, 0, 300
    for draw in range(seen):
        space = sampled(draw)
        search = find(space, judge(acc=0.05))
        spent, whole = spent + search.validations, whole + len(search.trials)
        best = search.best("size", {"acc": True}.get)
        assert best is not None
        drop = sum(error for name, error in space.errors.items() if name not in dict(best.choice.kept))
        wrong += best.keeps_all and drop > 0.05
        assert not best.keeps_all or sum(space.spoiled(best.choice)) / space.number <= 0.05
    assert wrong / seen <= 0.05
    assert spent < 0.8 * whole
