"""How long a call takes on this machine: contestants in turn, warm-up, medians and quartiles."""

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_quant.terminal.figures import figures

# Seconds below which a call is timed behind another of its own, and why turns are shuffled: in short calls whoever came
# before decides what the caches hold. The second of two files of one runtime took 30 % less time, and calls of 2.4 and
# 2.7 ms behind one of 125 ms took 12 and 7 ms.
_QUICK_S = 0.05


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contestant over all rounds.

    Attributes:
        median_ms: the middle of all rounds.
        low_ms: lower quartile.
        high_ms: upper quartile.
        num_rounds: how many rounds counted.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    num_rounds: int

    def __str__(self) -> str:
        return f"{figures(self.median_ms)} ({figures(self.low_ms)} to {figures(self.high_ms)})"


# Of one thread's work: what other processes take meanwhile is left out. Elsewhere that clock ticks too slowly.
ONE_THREAD = time.process_time if os.name == "posix" else time.perf_counter


def measure(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    min_rounds: int = 7,
    max_rounds: int = 50,
    budget_s: float = 3.0,
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Time contestants in rounds of random order, so that all of them see the same drift and caches of the machine.

    Args:
        contestants: name to a call without arguments.
        min_rounds: rounds that count at least; two more warm up.
        max_rounds: rounds that count at most.
        budget_s: seconds after which no further round begins.
        clock: that calls are timed by; that of the wall by default.
    """
    clock = clock or time.perf_counter
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order, shuffle = list(contestants), random.Random(0).shuffle
    started = time.perf_counter()
    with torch.no_grad():
        for turn in range(max_rounds + 2):
            if turn >= min_rounds + 2 and time.perf_counter() - started > budget_s:
                break
            shuffle(order)
            for name in order:
                elapsed = _seconds(contestants[name], clock)
                if elapsed < _QUICK_S:
                    elapsed = _seconds(contestants[name], clock)
                if turn >= 2:
                    samples[name].append(1000 * elapsed)
    return {name: _timing(values) for name, values in samples.items()}


def _seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    before = clock()
    call()
    return clock() - before


def _timing(values: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(middle, low, high, len(values))
