"""Fair timings, bootstrap intervals and Markdown tables for the benchmarks.

CPU time of one process is steadier than wall time on a shared machine; interleaving the contestants lets a slow
minute of the machine fall on all of them alike, and makes round `i` of one comparable with round `i` of another.
"""

import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_quant.machine.machine import cpu_name


class Estimate(NamedTuple):
    """A value with its 95 % bootstrap interval, printed as `0.91 [0.88, 0.95]`."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Format all three numbers with the same specification."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def interleaved(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int = 15,
    warmup: int = 3,
    clock: Callable[[], float] = time.process_time,
    seed: int = 0,
    *,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Call every contestant once per round, in a new random order each round.

    Args:
        contestants: by name; each is called without arguments.
        rounds: timed rounds, after `warmup` rounds that are not timed.
        warmup: rounds before the first timed one.
        clock: `time.process_time` for CPU time over all threads, `time.thread_time`, or `time.perf_counter`.
        seed: of the order.
        warm: whether each call follows one of its own that is not timed, as in reports: what another contestant left
            of the caches decides a call of microseconds.

    Returns:
        Seconds per call by name; entry `i` of every list comes from round `i`.
    """
    order = list(contestants)
    shuffle = random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(warmup + rounds):
        shuffle(order)
        for name in order:
            if warm:
                contestants[name]()
            start = clock()
            contestants[name]()
            elapsed = clock() - start
            if index >= warmup:
                seconds[name].append(elapsed)
    return seconds


def bootstrap_ratio(a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = 10_000) -> Estimate:
    """Estimate median(a) / median(b) from paired rounds, resampling rounds."""
    samples = np.stack([np.asarray(a, dtype=float), np.asarray(b, dtype=float)])
    rounds = np.random.default_rng(seed).integers(0, samples.shape[1], (resamples, samples.shape[1]))
    medians = np.median(samples[:, rounds], axis=2)
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    value = np.median(samples[0]) / np.median(samples[1])
    return Estimate(float(value), float(low), float(high))


def bootstrap_mean(values: torch.Tensor, seed: int = 0, resamples: int = 2_000) -> Estimate:
    """Estimate the mean of `values`, resampling its entries; give it differences for a paired comparison.

    Args:
        values: `(N,)` one value per test sample, for example whether the answer is right.
        seed: of the resampling.
        resamples: number of resampled means.
    """
    samples = values.double().numpy()
    generator = np.random.default_rng(seed)
    means = [samples[generator.integers(0, len(samples), len(samples))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(samples.mean()), float(low), float(high))


def median_ms(seconds: Sequence[float]) -> float:
    """Return the median of `seconds` in milliseconds."""
    return float(np.median(seconds)) * 1000


def machine(*packages: str) -> str:
    """Describe what the numbers depend on: CPU, threads, versions of these packages and of the two engines."""
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "onnxruntime", *packages)]
    return ", ".join(
        [cpu_name(), f"{torch.get_num_threads()} thread(s)", f"Python {platform.python_version()}", *versions]
    )


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Format rows as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
