import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_models import NUM_BATCHES, Classifier, EnoughError, StopAfterTraining, fit, images
from torch.utils.data import DataLoader, IterableDataset

from lightning_quant.callbacks.schedule import Schedule, Timeline, rate_of, timeline_of
from lightning_quant.errors import QuantizationError


@dataclass
class Run:
    """What `timeline_of` and `Timeline.phase` read of a Trainer."""

    num_training_batches: float = 4
    max_epochs: int | None = 10
    max_steps: int = -1
    accumulate_grad_batches: int = 1
    current_epoch: int = 0
    fit_loop: Any = field(default_factory=lambda: _Loop())


@dataclass
class _Loop:
    epoch_loop: Any = field(default_factory=lambda: _EpochLoop())


@dataclass
class _EpochLoop:
    total_batch_idx: int = 0


def test_bits_are_annealed_between_two_points_of_a_run() -> None:
    schedule = Schedule(fake_quantize=0.2, anneal_bits_until=0.6, freeze_observers=0.8)
    run = Run()
    timeline = timeline_of(schedule, run)
    widths = []
    for run.fit_loop.epoch_loop.total_batch_idx in range(40):
        widths.append(timeline.width(run))
    assert widths[:9] == [1.0] * 9
    assert widths[8:24] == pytest.approx([1 - i / 16 for i in range(16)])
    assert widths[24:] == [0.0] * 16
    assert timeline_of(Schedule(), run).width(run) == 0.0


@pytest.mark.parametrize("point", [0.1, 0.9, "half"])
def test_bits_are_annealed_while_ranges_are_free(point: Any) -> None:
    with pytest.raises(QuantizationError, match="points of `schedule` to be"):
        Schedule(anneal_bits_until=point)


class Phases(Callback):
    """Records the phase of a schedule before every training batch."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.seen: list[str] = []
        self.timeline: Timeline | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.timeline = timeline_of(self.schedule, trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        assert self.timeline is not None
        self.seen.append(self.timeline.phase(trainer))


class OneBatch(Classifier):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(images(4), 4)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield from images(8)


class EndlessData(Classifier):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Endless(), 4)


def phases(schedule: Schedule, module: LightningModule | None = None, **options: Any) -> list[str]:
    """Run a real Trainer and return the phase of every training batch."""
    recorder = Phases(schedule)
    with pytest.raises(EnoughError):
        fit(module or Classifier(), recorder, StopAfterTraining(), limit_val_batches=0, **options)
    return recorder.seen


def runs(*pairs: tuple[str, int]) -> list[str]:
    return [phase for phase, number in pairs for _ in range(number)]


# --- units, in real runs


def test_steps() -> None:
    schedule = Schedule(observe=1, fake_quantize=3, freeze_observers=5, freeze_batch_norm=6, unit="steps")

    assert phases(schedule, max_epochs=2) == runs(
        ("off", 1), ("observe", 2), ("fake_quantize", 2), ("frozen", 1), ("frozen_batch_norm", 2)
    )


def test_epochs() -> None:
    schedule = Schedule(observe=0, fake_quantize=1, freeze_observers=2, freeze_batch_norm=2.5, unit="epochs")

    assert phases(schedule, max_epochs=3) == runs(
        ("observe", NUM_BATCHES), ("fake_quantize", NUM_BATCHES), ("frozen", 2), ("frozen_batch_norm", 2)
    )


def test_fractions() -> None:
    schedule = Schedule(observe=0.25, fake_quantize=0.5, freeze_observers=0.75, freeze_batch_norm=0.875)

    assert phases(schedule, max_epochs=2) == runs(
        ("off", 2), ("observe", 2), ("fake_quantize", 2), ("frozen", 1), ("frozen_batch_norm", 1)
    )


def test_fractions_of_max_steps() -> None:
    schedule = Schedule(0, 0.5, 0.75, 1)

    assert phases(schedule, max_epochs=-1, max_steps=8) == runs(("observe", 4), ("fake_quantize", 2), ("frozen", 2))
    # The shorter of both limits is the run.
    assert phases(schedule, max_epochs=1, max_steps=100) == runs(("observe", 2), ("fake_quantize", 1), ("frozen", 1))


def test_steps_count_optimizer_steps_when_gradients_accumulate() -> None:
    schedule = Schedule(observe=0, fake_quantize=2, freeze_observers=3, freeze_batch_norm=4, unit="steps")

    assert phases(schedule, max_epochs=2, accumulate_grad_batches=2) == runs(
        ("observe", 4), ("fake_quantize", 2), ("frozen", 2)
    )


def test_max_steps_count_optimizer_steps_when_gradients_accumulate() -> None:
    schedule = Schedule(0, 0.5, 1, 1)

    assert phases(schedule, max_epochs=-1, max_steps=4, accumulate_grad_batches=2) == runs(
        ("observe", 4), ("fake_quantize", 4)
    )


def test_last_batches_of_an_epoch_make_an_optimizer_step_of_their_own() -> None:
    # Four batches, three to a step: two steps in every epoch.
    schedule = Schedule(observe=0, fake_quantize=2, freeze_observers=3, freeze_batch_norm=4, unit="steps")

    assert phases(schedule, max_epochs=2, accumulate_grad_batches=3) == runs(
        ("observe", 4), ("fake_quantize", 3), ("frozen", 1)
    )
    assert phases(Schedule(0, 0.75, 1, 1), max_epochs=-1, max_steps=4, accumulate_grad_batches=3) == runs(
        ("observe", 6), ("fake_quantize", 2)
    )


def test_run_of_one_batch_ends_in_rounding() -> None:
    assert phases(Schedule(), OneBatch(), max_epochs=1) == ["fake_quantize"]


def test_run_of_two_batches_observes_before_it_rounds() -> None:
    assert phases(Schedule(), OneBatch(), max_epochs=2) == ["observe", "fake_quantize"]


def test_fast_dev_run_rounds() -> None:
    assert phases(Schedule(), fast_dev_run=True)[-1] == "fake_quantize"


def test_data_of_unknown_length_counts_epochs() -> None:
    schedule = Schedule(observe=0, fake_quantize=1, freeze_observers=2, freeze_batch_norm=2, unit="epochs")
    options = {"max_epochs": 3, "limit_train_batches": 2}
    seen = phases(schedule, EndlessData(), **options)

    assert seen == runs(("observe", 2), ("fake_quantize", 2), ("frozen_batch_norm", 2))


def test_limit_of_batches_is_the_length_of_an_epoch() -> None:
    schedule = Schedule(0, 0.5, 1, 1)

    assert phases(schedule, max_epochs=2, limit_train_batches=2) == runs(("observe", 2), ("fake_quantize", 2))


# --- positions, without a run


@pytest.mark.parametrize(
    ("batches", "starts"),
    [
        (1, (0, 0, 1, math.inf)),
        (2, (0, 1, 2, math.inf)),
        (100, (0, 20, 80, math.inf)),
        (1000, (0, 200, 800, math.inf)),
    ],
)
def test_default_fractions_never_freeze_batch_norm(batches: int, starts: tuple[int, ...]) -> None:
    timeline = timeline_of(Schedule(), Run(num_training_batches=batches, max_epochs=1))

    assert tuple(timeline.starts.values()) == starts


def test_fractions_that_binary_floats_miss_by_a_hair() -> None:
    # 0.7 * 10 is 7.000000000000001 in binary floats when computed as 0.1 * 7 * 10.
    timeline = timeline_of(Schedule(0, 0.2, 0.1 * 7, 0.9), Run(num_training_batches=10, max_epochs=1))

    assert timeline.starts["frozen"] == 7


def test_epochs_of_data_without_length() -> None:
    schedule = Schedule(0, 1, 2, 3, unit="epochs")
    run = Run(num_training_batches=math.inf, max_epochs=4)
    timeline = timeline_of(schedule, run)
    seen = []
    for epoch in range(4):
        run.current_epoch = epoch
        seen.append(timeline.phase(run))

    assert seen == ["observe", "fake_quantize", "frozen", "frozen_batch_norm"]


def test_endless_run_takes_steps_or_epochs() -> None:
    endless = Run(max_epochs=-1)

    assert timeline_of(Schedule(0, 10, 20, 30, unit="steps"), endless).starts["fake_quantize"] == 10
    assert timeline_of(Schedule(0, 10, 20, 30, unit="epochs"), endless).starts["fake_quantize"] == 40


# --- refusals


def test_endless_run_has_no_fractions() -> None:
    with pytest.raises(QuantizationError, match=r"neither `max_epochs` nor `max_steps`.*in 'epochs' or 'steps'"):
        timeline_of(Schedule(), Run(max_epochs=-1))


@pytest.mark.parametrize(
    ("schedule", "run"),
    [
        (Schedule(0, 2, 3, 4, unit="epochs"), Run(max_epochs=2)),
        (Schedule(0, 8, 9, 9, unit="steps"), Run(max_epochs=2)),
        (Schedule(0, 8, 9, 9, unit="steps"), Run(max_epochs=100, max_steps=8)),
        (Schedule(0, 8, 9, 9, unit="steps"), Run(max_epochs=2, num_training_batches=8, accumulate_grad_batches=2)),
        (Schedule(0, 4, 5, 6, unit="epochs"), Run(max_epochs=4, num_training_batches=math.inf)),
    ],
)
def test_run_that_never_rounds_is_refused(schedule: Schedule, run: Run) -> None:
    with pytest.raises(
        QuantizationError, match=r"reach fake quantization in this run, .* Train longer or begin earlier"
    ):
        timeline_of(schedule, run)


def test_run_that_rounds_in_its_last_batch_is_accepted() -> None:
    assert timeline_of(Schedule(0, 7, 8, 8, unit="steps"), Run(max_epochs=2)).starts["fake_quantize"] == 7


def test_fraction_that_never_rounds_is_refused_at_once() -> None:
    with pytest.raises(QuantizationError, match="Choose a fraction below 1"):
        Schedule(observe=0, fake_quantize=1.0, freeze_observers=1.0, freeze_batch_norm=1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"observe": 0.5, "fake_quantize": 0.2},
        {"fake_quantize": 0.9},
        {"freeze_observers": 0.9, "freeze_batch_norm": 0.5},
        {"observe": -0.1},
    ],
)
def test_points_out_of_order_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(QuantizationError, match="points of `schedule` to be positive and in order"):
        Schedule(**arguments)


def test_unknown_unit_is_refused_with_the_choices() -> None:
    with pytest.raises(QuantizationError, match=r"`schedule\.unit` to be one of .*'epochs'.* got 'batches'"):
        Schedule(unit="batches")


def test_the_learning_rate_of_an_optimizer_is_the_highest_of_its_groups() -> None:
    values = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    first = torch.optim.SGD([{"params": values[:1], "lr": 0.1}, {"params": values[1:2], "lr": 0.3}])
    second = torch.optim.Adam(values[2:], torch.tensor(0.02), capturable=False)
    trainer = SimpleNamespace(optimizers=[first, second])
    assert rate_of(trainer, first) == (0, 0.3)
    assert rate_of(trainer, second) == (1, pytest.approx(0.02))
    first.param_groups = [{"params": values[:1], "lr": None}]
    assert rate_of(trainer, first) == (0, 1.0)
