"""What is slower in integers stays float, and what transitions cost decides with it."""

import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_models import ConvNet

from lightning_quant.errors import PlanError
from lightning_quant.export.prepare import prepare
from lightning_quant.recipe.recipe import RECIPES, Recipe
from lightning_quant.search.choice import FLOAT, Choice
from lightning_quant.search.find import find
from lightning_quant.search.quicker import MOST, floating, quicker, transitions


class Times:
    """Operators in a row with times in integers and in float, and a price of each transition between them."""

    def __init__(self, integers: list[float], floats: list[float], price: float) -> None:
        self.names = [f"op{index}" for index in range(len(integers))]
        self.integers, self.floats, self.price, self.timed = integers, floats, price, 0

    def of(self, choice: Choice) -> float:
        in_float = [True, *(name in dict(choice.kept) for name in self.names), True]
        own = sum(f if kept else i for i, f, kept in zip(self.integers, self.floats, in_float[1:-1], strict=True))
        return own + self.price * sum(a != b for a, b in itertools.pairwise(in_float))

    def ratio(self, one: Choice, other: Choice) -> float:
        self.timed += 1
        return self.of(one) / self.of(other)


def drawn(seed: int) -> Times:
    chance = random.Random(seed)
    number = chance.randint(2, 9)
    integers = [chance.choice([0.4, 0.5, 2.0]) for _ in range(number)]
    return Times(integers, [1.0] * number, chance.choice([0.0, 0.1, 0.4, 2.0]))


def test_no_plan_is_slower_than_all_integers_or_all_float() -> None:
    gained = []
    for seed in range(60):
        times = drawn(seed)
        found = quicker(times.names, Choice(), times.ratio)
        assert times.timed <= MOST
        ends = [times.of(Choice()), times.of(floating(Choice(), times.names))]
        assert times.of(found) <= 1.02 * min(ends)
        best = min(
            times.of(floating(Choice(), [n for n, kept in zip(times.names, mask, strict=True) if kept]))
            for mask in itertools.product([False, True], repeat=len(times.names))
        )
        gained.append((min(ends) - times.of(found)) / max(min(ends) - best, 1e-9) if best < min(ends) else 1.0)
    # Of what the best of all mixes gains over both ends.
    assert sum(gained) / len(gained) > 0.6


def test_a_slow_operator_stays_float_unless_its_transitions_cost_more() -> None:
    for price, expected in ((0.1, {"op1": FLOAT}), (0.5, {})):
        times = Times([0.1, 1.6, 0.1, 0.1], [1.0] * 4, price)
        assert dict(quicker(times.names, Choice(), times.ratio).kept) == expected


def test_what_limits_keep_in_float_stays_so_and_what_cannot_be_made_is_left_out() -> None:
    times = Times([2.0, 2.0], [1.0, 1.0], 0.0)
    base = Choice((("op0", FLOAT),))

    def ratio(one: Choice, other: Choice) -> float:
        if "op1" in dict(one.kept):
            raise PlanError("not without the other")
        return times.ratio(one, other)

    assert quicker(times.names, base, ratio) == base
    assert dict(quicker(times.names, base, times.ratio).kept) == {"op0": FLOAT, "op1": FLOAT}


def space(times: Times, keeps: Callable[[Choice], bool] = lambda _: True) -> Any:
    """Return what a search of the least latency can try."""
    float_ms = times.of(floating(Choice(), times.names))

    def measure(choice: Choice, _: Any = None) -> Any:
        kept = keeps(choice)
        return SimpleNamespace(
            latency_ms={"1": times.of(choice)},
            relative_time=times.of(choice) / float_ms,
            kept=kept,
            share=1.0,
            size_bytes=1,
        )

    return SimpleNamespace(
        measure=measure,
        accurate=lambda: None,
        steps=lambda: [floating(Choice(), times.names[:1])],
        cheaper=lambda *_: None,
        quicker=lambda base: quicker(times.names, base, times.ratio),
        all_float=lambda: floating(Choice(), times.names),
        times=lambda choices: [times.of(choice) for choice in choices],
    )


def judge(measured: Any, look: int) -> Any:
    return (SimpleNamespace(kept=measured.kept, on_metric=True, miss=float(not measured.kept)),)


def test_a_search_for_latency_ends_with_a_file_as_quick_as_the_better_end() -> None:
    for seed in range(40):
        times = drawn(seed)
        best = find(space(times), judge, "latency").best("latency", {}.get)
        assert best is not None
        ends = [times.of(Choice()), times.of(floating(Choice(), times.names))]
        assert times.of(best.choice) <= 1.02 * min(ends)


@pytest.mark.parametrize(("end", "slow"), [("integers", [1.5, 1.0, 1.2]), ("float", [1.5, 1.2, 1.0])])
def test_a_mix_that_the_last_run_finds_slower_gives_way_to_the_better_end(end: str, slow: list[float]) -> None:
    times = Times([0.5, 2.0, 0.5], [1.0] * 3, 0.0)
    tried = space(times)
    mixed = find(tried, judge, "latency")
    assert mixed.best("latency", {}.get).choice.kept == (("op1", FLOAT),)  # type: ignore[union-attr]
    tried.times = lambda choices: slow[: len(choices)]
    record = find(tried, judge, "latency")
    expected = Choice() if end == "integers" else tried.all_float()
    assert record.best("latency", {}.get).choice == expected  # type: ignore[union-attr]
    assert f"{expected} takes 0.667 of its time and is taken" in record.ended
    tried.times = lambda choices: [1.01, 1.0, 1.0][: len(choices)]
    assert find(tried, judge, "latency").ended == mixed.ended


def test_an_end_that_misses_a_limit_is_not_taken_for_its_speed() -> None:
    times = Times([0.5, 2.0, 0.5], [1.0] * 3, 0.0)
    tried = space(times, lambda choice: dict(choice.kept) == {"op1": FLOAT})
    tried.steps = lambda: [Choice((("op1", FLOAT),))]
    tried.times = lambda choices: [1.5, 1.0, 1.0][: len(choices)]
    record = find(tried, judge, "latency")
    assert record.best("latency", {}.get).choice.kept == (("op1", FLOAT),)  # type: ignore[union-attr]
    assert "though" in record.ended


@pytest.mark.parametrize("objective", ["latency", "size"])
def test_everything_in_float_is_tried_where_no_mix_keeps_the_limits(objective: str) -> None:
    times = Times([0.1] * 3, [1.0] * 3, 0.0)
    everything = floating(Choice(), times.names)
    best = find(space(times, lambda choice: choice == everything), judge, "latency").best("latency", {}.get)
    assert best is not None
    assert best.choice == everything


def test_transitions_are_counted() -> None:
    model, call = ConvNet(), (torch.randn(2, 1, 8, 8),)

    def plan(**overrides: str) -> Any:
        recipe = RECIPES["int8"]
        assert isinstance(recipe, Recipe)
        chosen = Recipe(overrides=overrides)
        return prepare(model, call, recipe=chosen, trains=False, may_stay_float=True).plan

    # Into the first layer and out of the last.
    assert transitions(plan()) == 2
    assert transitions(plan(head="float")) == 2
    assert transitions(plan(conv2="float")) == 4
    assert transitions(plan(**dict.fromkeys(("conv1", "conv2", "add", "max_pool2d", "head"), "float"))) == 0
    with pytest.raises(PlanError):
        prepare(model, call, recipe=Recipe(overrides={"*": "float"}), trains=False)
