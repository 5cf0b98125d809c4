import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning_models import NUM_CLASSES, Classifier, fit, images
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection, SpearmanCorrCoef
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MultilabelAUROC,
)
from torchmetrics.image import RelativeAverageSpectralError
from torchmetrics.retrieval import RetrievalMRR

from lightning_quant.measure.contributions import Difference, difference
from lightning_quant.measure.evaluate import evaluate
from lightning_quant.measure.recorder import Recorder, States


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
        monkeypatch.setattr("lightning_quant.measure.recorder._MAX_BYTES", room)
        recorder = Recorder()
        for _ in range(8):
            metric.update(torch.randn(16, NUM_CLASSES), torch.randint(NUM_CLASSES, (16,)))
            recorder.note({}, {"accuracy": metric})
        parts = recorder.contributions("accuracy", float(metric.compute()), metric)
        assert (parts.number if parts else 0) == number
        metric.reset()


def compared(make: Callable[[], Metric], floating: Tensor, quantized: Tensor, *rest: Tensor) -> Difference:
    """Return how far a metric of two models' answers is apart, updated in batches of twenty."""
    values, parts = [], []
    for preds in (quantized, floating):
        states = States(make())
        for batch in zip(*(x.split(20) for x in (preds, *rest)), strict=True):
            states.metric.update(batch[0], batch[1], **({"indexes": batch[2]} if len(batch) > 2 else {}))
            states.note()
        values.append(float(states.metric.compute()))
        own = states.contributions()
        assert own is not None
        parts.append(dataclasses.replace(own, samples=len(preds)))
    return difference(*values, *parts)


def test_a_sample_of_a_rare_class_counts_as_much_in_an_area_as_it_moves_it() -> None:
    generator = torch.Generator().manual_seed(0)
    target = (torch.arange(400) % 20 == 0).long()
    scores = (torch.randn(400, generator=generator) + 3 * target).sigmoid()
    same = compared(BinaryAUROC, scores, scores.clone(), target)
    # Nothing differs, and one of the twenty positive samples that were seen may: of an area, a twentieth.
    assert same.value == 0
    assert same.span == pytest.approx(400 / 20, rel=0.02)
    assert same.margin == pytest.approx(20 * (1 - 0.05 ** (1 / 400)), rel=0.02)
    lost = scores.clone()
    lost[20] = 0.0
    assert (compared(BinaryAUROC, scores, lost, target).margin or 0) > (same.margin or 1)


@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save:UserWarning")
@pytest.mark.parametrize("kind", ["classes", "outputs", "numbers", "queries"])
def test_one_sample_moves_every_metric_of_lists(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, n = torch.rand(200, generator=generator), torch.arange(200)
    if kind == "classes":
        y = torch.where(n % 20 == 0, 3, n % 3)
        scores = (torch.rand(200, 4, generator=generator) + torch.nn.functional.one_hot(y, 4)).softmax(1)
        found = compared(lambda: MulticlassAUROC(4), scores, scores, y)
    elif kind == "outputs":
        y = torch.stack([n % 2, n % 5 == 0], 1).long()
        scores = (torch.rand(200, 2, generator=generator) + y) / 2
        found = compared(lambda: MultilabelAUROC(2), scores, scores, y)
    elif kind == "numbers":
        found = compared(SpearmanCorrCoef, x, x, x + 0.1 * torch.rand(200, generator=generator))
    else:
        found = compared(RetrievalMRR, x, x, n % 5 == 0, n // 10)
    assert found.span > 1.5
    assert (found.margin or 0) == pytest.approx(found.span * (1 - 0.05 ** (1 / 200)))


def test_images_that_a_metric_keeps_are_no_scores() -> None:
    states = States(RelativeAverageSpectralError())
    for size in (16, 24):
        states.metric.update(torch.rand(2, 3, size, size), torch.rand(2, 3, size, size))
        states.note()
    parts = states.contributions()
    assert parts is not None
    assert parts.step is not None
    assert parts.step() == 0


@pytest.mark.slow
@pytest.mark.parametrize("metric", [BinaryAUROC, BinaryAveragePrecision])
@pytest.mark.parametrize("how", ["lost", "noisy"])
def test_worse_scores_are_seldom_taken_for_good(metric: type[Metric], how: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(number: int) -> tuple[Tensor, Tensor, Tensor]:
        target = (torch.rand(number, generator=generator) < 0.05).long()
        scores = torch.randn(number, generator=generator) + 3 * target
        noise = torch.randn(number, generator=generator)
        if how == "noisy":
            return scores.sigmoid(), (scores + 0.7 * noise).sigmoid(), target
        is_lost = (target == 1) & (torch.rand(number, generator=generator) < 0.03)
        return scores.sigmoid(), torch.where(is_lost, -5.0, scores + 0.01 * noise).sigmoid(), target

    floating, quantized, target = draw(200_000)
    fall = float(metric()(floating, target) - metric()(quantized, target))
    wrong, number = 0, 150
    for _ in range(number):
        # A little less than it truly falls is allowed.
        wrong += compared(metric, *draw(400)).worst(higher_is_better=True) <= 0.98 * fall
    assert wrong / number <= 0.05
