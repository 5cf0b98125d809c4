import itertools
import math
from typing import Any

import pytest
import torch
from lightning_models import NUM_CLASSES, Classifier, fit, images
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

from lightning_quant.measure.contributions import Recorder, difference, of_means, of_samples, student_quantile
from lightning_quant.measure.evaluate import evaluate


@pytest.mark.parametrize(
    ("degrees", "expected"), [(4, 2.1318), (5, 2.0150), (10, 1.8125), (63, 1.6694), (1000, 1.6464)]
)
def test_quantiles_are_those_of_tables(degrees: int, expected: float) -> None:
    assert student_quantile(0.95, degrees) == pytest.approx(expected, rel=5e-3)


def test_the_margin_of_a_mean_is_that_of_the_paired_test() -> None:
    torch.manual_seed(0)
    x, noise = torch.randn(40).double(), 0.1 * torch.randn(40).double()
    found = difference(
        float((x + noise).mean()), float(x.mean()), of_samples((x + noise).tolist()), of_samples(x.tolist())
    )
    # What all samples have in common is left out: the spread is that of the differences alone.
    assert found.margin == pytest.approx(student_quantile(0.95, 39) * float(noise.std()) / math.sqrt(40), rel=1e-6)
    assert found.worst(higher_is_better=True) == pytest.approx(-float(noise.mean()) + (found.margin or 0))


def test_one_in_twenty_intervals_of_no_difference_leaves_it_out() -> None:
    generator = torch.Generator().manual_seed(1)
    outside = 0
    for _ in range(400):
        values = torch.randn(12, generator=generator).tolist()
        found = difference(sum(values) / 12, 0.0, of_samples(values), of_samples([0.0] * 12))
        outside += found.worst(higher_is_better=True) < 0
    assert 0.02 < outside / 400 < 0.08


def test_no_interval_is_told_with_its_reason() -> None:
    few, many, others = of_samples([1.0] * 3), of_samples([1.0] * 8), of_means([1.0] * 8, [2.0] * 8)
    assert "no contribution" in difference(1.0, 1.0, None, many).why
    assert "too few" in difference(1.0, 1.0, few, few).why
    assert "not the same" in difference(1.0, 1.0, many, others).why


def test_where_no_sample_differs_the_interval_is_that_of_what_was_not_seen() -> None:
    found = difference(0.9, 0.9, *[of_samples([1.0] * 90 + [0.0] * 10)] * 2)
    # Clopper and Pearson's for no event in a hundred, by tables.
    assert found.margin == pytest.approx(0.0295, abs=1e-4)
    assert found.worst(higher_is_better=True, confidence=0.99) == pytest.approx(1 - 0.01 ** (1 / 100))
    # Batches count by their samples, and percent by their span.
    batches = of_means([90.0] * 8, [50.0] * 8)
    assert difference(90.0, 90.0, batches, batches).margin == pytest.approx(90 * (1 - 0.05 ** (1 / 400)))
    one = of_samples([1.0] * 89 + [0.0] * 11)
    few = difference(0.89, 0.9, one, of_samples([1.0] * 90 + [0.0] * 10))
    # Of one in a hundred 0.0466.
    assert few.margin == pytest.approx(0.0366, abs=1e-4)
    # Of what differs everywhere the spread tells.
    all_differ = difference(0.5, 0.4, of_samples([0.5 + 1e-3 * (i % 2) for i in range(100)]), of_samples([0.4] * 100))
    assert all_differ.margin is not None
    assert all_differ.margin < 1e-3


def test_files_that_would_be_worse_are_seldom_taken_for_good_when_few_samples_differ() -> None:
    generator, wrong = torch.Generator().manual_seed(0), 0
    allowed, number = 0.02, 200
    for _ in range(400):
        # Truly worse by a little more than is allowed.
        worse = (torch.rand(number, generator=generator) < 1.02 * allowed).tolist()
        found = difference(
            1 - sum(worse) / number, 1.0, of_samples([1.0 - w for w in worse]), of_samples([1.0] * number)
        )
        wrong += found.worst(higher_is_better=True) <= allowed
    assert wrong / 400 <= 0.05


class Measuring(Classifier):
    """Logs metrics in every way that projects do."""

    def __init__(self) -> None:
        super().__init__()
        self.by_hand, self.area = MulticlassAccuracy(NUM_CLASSES), MulticlassAUROC(NUM_CLASSES)
        self.several = MetricCollection(
            {"f1": MulticlassF1Score(NUM_CLASSES), "macro": MulticlassAccuracy(NUM_CLASSES)}
        )
        self.seen: list[tuple[Tensor, Tensor]] = []

    def val_dataloader(self) -> Any:
        return DataLoader(images(60, seed=5), 8)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        x, y = batch
        output = self.net(x).softmax(1)
        self.by_hand.update(output, y)
        self.area.update(output, y)
        self.several.update(output, y)
        self.log_dict({**self.several, "area": self.area})
        self.log("largest", output.max(), reduce_fx=max)
        self.seen.append((output, y))

    def on_validation_epoch_end(self) -> None:
        self.log("by_hand", self.by_hand.compute())
        self.by_hand.reset()


def test_parts_of_every_kind_of_metric_make_up_its_value() -> None:
    model = Measuring()
    trainer = fit(model, max_epochs=1)
    values = evaluate(trainer, model, "net", contributions=True)
    assert set(values) - set(values.contributions) == {"largest"}
    for name, parts in values.contributions.items():
        assert parts.number == 8, name
        assert parts.of(range(8)) == pytest.approx(values[name], rel=1e-4), name
    # Of some batches alone it is what validating on these alone gives.
    alone = evaluate(trainer, model, "net", limit_batches=3)
    for name, parts in values.contributions.items():
        assert parts.of(range(3)) == pytest.approx(alone[name], rel=1e-4), name
    # Metrics that keep all they saw take long to compute again and again: a search asks for them, a report does not.
    assert set(values.contributions) - set(evaluate(trainer, model, "net").contributions) == {"area"}


def test_a_metric_that_is_not_the_sum_of_its_parts_has_none() -> None:
    class Moving(Classifier):
        """Logs a value that depends on when it is asked."""

        counter = itertools.count()

        def on_validation_epoch_end(self) -> None:
            self.log("count", float(next(self.counter) + 1))

    model = Moving()
    values = evaluate(fit(model, max_epochs=1), model, "net", contributions=True)
    assert "count" in values
    assert "count" not in values.contributions


def test_states_that_would_fill_the_memory_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = MulticlassAccuracy(NUM_CLASSES)
    for room, number in ((2**20, 8), (200, 0)):
        monkeypatch.setattr("lightning_quant.measure.contributions._MAX_BYTES", room)
        recorder = Recorder()
        for _ in range(8):
            metric.update(torch.randn(16, NUM_CLASSES), torch.randint(NUM_CLASSES, (16,)))
            recorder.note({}, {"accuracy": metric})
        parts = recorder.contributions("accuracy", float(metric.compute()), metric)
        assert (parts.number if parts else 0) == number
        metric.reset()
