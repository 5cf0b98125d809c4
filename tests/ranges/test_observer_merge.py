"""Observers of several processes become one as their classes say, or are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing

from lightning_quant.calibrate.distributed import Group, calibrate_together
from lightning_quant.errors import QuantizationError
from lightning_quant.export.prepare import prepare
from lightning_quant.ranges import observers
from lightning_quant.ranges.observer_merge import check_mergeable, merged
from lightning_quant.ranges.observers import MinMax, MovingAverage, Observer, Percentile
from lightning_quant.recipe.recipe import Recipe


class Quantiles(Observer):
    """The mean of every batch's 5 % and 95 % quantiles."""

    merge = {"low": "mean", "high": "mean", "num_updates": "sum"}  # noqa: RUF012

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        ends = torch.quantile(x.float(), torch.tensor([0.05, 0.95]))
        mean = ends if self.low is None else torch.stack([self.low, self.high])
        self.low, self.high = mean + (ends - mean) / (self.num_updates + 1)


class Undeclared(Observer):
    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.low, self.high, self.squares = low, high, x.square().sum()


class Inherited(MinMax):
    """Updates its states in another way than the class that said how they merge."""

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.low, self.high = 0.9 * low, 0.9 * high


BATCHES = [torch.randn(100, generator=torch.Generator().manual_seed(seed)) * (1 + seed) for seed in range(6)]


def seen(make: Callable[[], Observer], batches: list[Tensor]) -> Observer:
    observer = make()
    if isinstance(observer, observers.Histogram):
        observer.fix_span(torch.tensor(-40.0), torch.tensor(40.0))
    for batch in batches:
        observer.update(batch)
    return observer


@pytest.mark.parametrize("make", [MinMax, Percentile, Quantiles, lambda: MovingAverage(0.0)])
def test_two_observers_become_the_one_that_saw_all(make: Callable[[], Observer]) -> None:
    parts, whole = (seen(make, BATCHES[:2]), seen(make, BATCHES[2:])), seen(make, BATCHES)
    together = make()
    together.load_state(merged(together, [part.state() for part in parts]))

    assert together.num_updates == whole.num_updates
    for actual, expected in zip(together.range(), whole.range(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_states_that_should_be_the_same_must_be() -> None:
    other = Percentile()
    other.update(BATCHES[1])
    states = [seen(Percentile, BATCHES[:1]).state(), other.state()]
    with pytest.raises(QuantizationError, match="state 'span_low' of an observer to be the same in all processes"):
        merged(Percentile(), states)


@pytest.mark.parametrize("make", [Undeclared, Inherited])
def test_undeclared_states_are_refused(make: type[Observer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(observers.OBSERVERS, "own", lambda recipe: make())
    with pytest.raises(QuantizationError, match=rf"{make.__name__}\.merge says nothing of \['high', 'low'"):
        check_mergeable("calibration_observer", "own", Recipe(), in_training=False)


class Rare(Quantiles):
    """Keeps something of large values alone, which it has not said how to merge."""

    merge = {**Quantiles.merge}  # noqa: RUF012

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        super()._update(x, low, high)
        if high > 5:
            self.largest = high


def test_a_state_that_some_values_alone_bring_about_is_refused_or_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(observers.OBSERVERS, "own", lambda recipe: Rare())
    check_mergeable("calibration_observer", "own", Recipe(), in_training=False)
    states = [seen(Rare, [0.1 * BATCHES[0]]).state(), seen(Rare, [9 * BATCHES[5]]).state()]
    with pytest.raises(QuantizationError, match=r"Rare\.merge says nothing of \['largest'\]"):
        merged(Rare(), states)

    monkeypatch.setattr(Rare, "merge", {**Quantiles.merge, "largest": "max"})
    for parts in (states, states[::-1]):
        assert merged(Rare(), parts)["largest"] == 9 * BATCHES[5].max()


def test_training_exchanges_extremes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(observers.OBSERVERS, "own", lambda recipe: Quantiles())
    check_mergeable("calibration_observer", "own", Recipe(), in_training=False)
    for name in ("own", "mse"):
        with pytest.raises(QuantizationError, match=rf"'moving_average' or 'min_max' in several .*, but got '{name}'"):
            check_mergeable("training_observer", name, Recipe(), in_training=True)
    for name in ("moving_average", "min_max"):
        check_mergeable("training_observer", name, Recipe(), in_training=True)


def test_a_merge_that_is_none_is_refused_when_built(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Quantiles):
        merge = {"low": "median"}  # noqa: RUF012

    monkeypatch.setitem(observers.OBSERVERS, "own", lambda recipe: Wrong())
    with pytest.raises(
        QuantizationError, match=r"Wrong\.merge to map states to one of .*, but got \{'low': 'median'\}"
    ):
        observers.build("own", Recipe())


def calibrated(rank: int, size: int, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    observers.OBSERVERS["quantiles"] = lambda recipe: Quantiles()
    if size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 4))
    prepared = prepare(model.eval(), (BATCHES[0].view(10, 10),), observer="quantiles")

    def steps() -> Any:
        return [lambda x=batch: model(x.view(10, 10)) for batch in BATCHES[rank::size]]

    calibrate_together(Group(size), prepared, steps)
    results[(rank, size)] = [float(end) for end in prepared.ranges.observers[":input"].range()]
    if size > 1:
        torch.distributed.destroy_process_group()


def test_an_observer_of_ones_own_in_two_processes(tmp_path: Any) -> None:
    results: dict[Any, list[float]] = {}
    calibrated(0, 1, str(tmp_path), results)
    # Forked: what a fresh process imports takes longer than all the rest.
    shared = multiprocessing.get_context("fork").Manager().dict()
    multiprocessing.start_processes(calibrated, (2, str(tmp_path), shared), nprocs=2, start_method="fork")

    assert shared[(0, 2)] == shared[(1, 2)] == pytest.approx(results[(0, 1)], rel=1e-5)
