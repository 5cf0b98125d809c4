import itertools
from typing import Any

import pytest
import torch
from lightning_models import NUM_CLASSES, Classifier, fit, images
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

from lightning_quant.measure.evaluate import evaluate
from lightning_quant.measure.recorder import Recorder


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
