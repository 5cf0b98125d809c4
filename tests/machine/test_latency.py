import statistics
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch

from lightning_quant.machine import latency
from lightning_quant.machine.latency import ONE_THREAD, Timing, measure
from lightning_quant.surgery.process import torch_threads


class Clock:
    """A clock that only moves when a contestant works."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, *seconds: float) -> Callable[[], None]:
        """Return a call that takes these times in turn, and the last one from then on."""
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock.now)
    return clock


def test_median_and_quartiles_in_milliseconds(clock: Clock) -> None:
    samples = [0.5, 0.1, 0.2, 0.4, 0.3, 0.7, 0.6]
    timing = measure({"a": clock.work(1.0, 1.0, *samples)}, min_rounds=7, max_rounds=7)["a"]

    assert timing.num_rounds == 7
    assert timing.median_ms == pytest.approx(statistics.median(samples) * 1000)
    assert timing.low_ms == pytest.approx(250)
    assert timing.high_ms == pytest.approx(550)


def test_warm_up_does_not_count(clock: Clock) -> None:
    timing = measure({"a": clock.work(9.0, 9.0, 0.002)}, min_rounds=5, max_rounds=5)["a"]

    assert (timing.low_ms, timing.median_ms, timing.high_ms) == pytest.approx((2, 2, 2))


def test_contestants_take_turns() -> None:
    calls = ""

    def contestant(name: str) -> Callable[[], None]:
        def call() -> None:
            nonlocal calls
            calls += name

        return call

    measure({name: contestant(name) for name in "ab"}, min_rounds=2, max_rounds=8)
    turns = {calls[at : at + 4] for at in range(0, len(calls), 4)}

    assert len(calls) == 4 * 10
    assert turns == {"aabb", "bbaa"}


def test_quick_calls_do_not_depend_on_who_came_before(clock: Clock) -> None:
    last = ""

    def contestant(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            nonlocal last
            clock.now += seconds if last == name else 2 * seconds
            last = name

        return call

    quick = {"a": contestant("a", 1e-4), "b": contestant("b", 2e-4)}
    medians = [measure({name: quick[name] for name in order}) for order in ("ab", "ba")]

    assert [t["a"].median_ms for t in medians] == pytest.approx([0.1, 0.1])
    assert [t["b"].median_ms for t in medians] == pytest.approx([0.2, 0.2])


def test_calls_that_take_long_are_made_once_a_round(clock: Clock) -> None:
    calls = []

    def slow() -> None:
        calls.append(None)
        clock.now += 1.0

    assert measure({"slow": slow}, min_rounds=2, max_rounds=2)["slow"].num_rounds == len(calls) - 2


def test_rounds_end_with_the_budget_but_not_before_the_minimum(clock: Clock) -> None:
    def rounds(budget_s: float) -> int:
        return measure({"a": clock.work(1.0)}, min_rounds=4, max_rounds=20, budget_s=budget_s)["a"].num_rounds

    assert rounds(budget_s=0.0) == 4
    assert rounds(budget_s=10.5) == 9
    assert rounds(budget_s=1000.0) == 20


def test_no_gradients_are_recorded() -> None:
    seen = []
    measure({"a": lambda: seen.append(torch.is_grad_enabled())}, min_rounds=2, max_rounds=2)

    assert not any(seen)
    assert torch.is_grad_enabled()


def test_threads_are_given_back_also_after_an_error() -> None:
    before = torch.get_num_threads()
    with suppress(KeyError), torch_threads(before + 1):
        inside = torch.get_num_threads()
        raise KeyError

    assert inside == before + 1
    assert torch.get_num_threads() == before


def test_timing_reads_well() -> None:
    assert str(Timing(12.3456, 11.9, 13.04, 9)) == "12.3 (11.9 to 13)"


def test_what_a_call_waits_for_is_no_time_of_the_process() -> None:
    timings = measure({"waits": lambda: time.sleep(0.01)}, min_rounds=2, max_rounds=2, clock=ONE_THREAD)
    assert timings["waits"].median_ms < 5
