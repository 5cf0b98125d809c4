from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryF1Score

from lightning_quant import quantize
from lightning_quant.doors.evaluated import metrics_of
from lightning_quant.doors.yielded import Yielded
from lightning_quant.errors import EvaluationError, QuantizationError
from lightning_quant.measure.contributions import differences
from lightning_quant.measure.interim import Interim

LABELS = torch.randint(2, (240,), generator=torch.Generator().manual_seed(0))
ANSWERS = torch.where(torch.rand(240, generator=torch.Generator().manual_seed(1)) < 0.1, 1 - LABELS, LABELS)


def f1_of(model: nn.Module) -> Any:
    """Yield F1 after each batch of twelve; the module, which leaves answers as they are, sees all samples."""
    metric = BinaryF1Score()
    for answers, labels in zip(ANSWERS.split(12), LABELS.split(12), strict=True):
        metric.update(model(answers.float()).round(), labels)
        yield {"f1": metric}


def f1(answers: torch.Tensor, labels: torch.Tensor) -> float:
    hits = float((answers * labels).sum())
    return 2 * hits / float(answers.sum() + labels.sum())


class _OneFlipped(nn.Module):
    """Answers one of the first batch otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.cat([1 - x[:1], x[1:]]) if self.calls == 1 else x


def test_a_metric_that_is_yielded_after_each_update_has_an_interval() -> None:
    floating, other = metrics_of(f1_of, nn.Identity()), metrics_of(f1_of, _OneFlipped())
    assert floating == {"f1": pytest.approx(f1(ANSWERS, LABELS), abs=1e-6)}
    assert floating.higher_is_better == {"f1": True}
    parts = floating.contributions["f1"]
    assert [parts.number, parts.samples] == [20, 240]
    assert parts.of([0, 3]) == pytest.approx(f1(ANSWERS.view(20, 12)[[0, 3]], LABELS.view(20, 12)[[0, 3]]), abs=1e-6)
    apart = differences(other, floating)["f1"]
    assert apart.value == pytest.approx(other["f1"] - floating["f1"])
    assert apart.margin is not None
    assert apart.margin > abs(apart.value)
    assert apart.samples == 240


def test_one_sample_of_a_rare_class_is_more_than_its_share_of_f1() -> None:
    labels = torch.zeros(1000)
    labels[::40] = 1.0

    def evaluate(model: nn.Module) -> Any:
        metric = BinaryF1Score()
        for part in labels.split(50):
            metric.update(model(part), part)
            yield {"f1": metric}

    floating = metrics_of(evaluate, nn.Identity())
    # Answering one of 25 otherwise takes 1 / 49 of F1, 20 times its share of the samples, and none was seen to differ.
    apart = differences(floating, floating)["f1"]
    step = 1 - f1(torch.cat([torch.zeros(1), torch.ones(24)]), torch.ones(25))
    assert apart.span == pytest.approx(1000 * step, rel=0.05)
    assert apart.worst(higher_is_better=True) == pytest.approx(1000 * step * (1 - 0.05 ** (1 / 1000)), rel=0.05)


def test_a_part_of_its_updates_may_decide() -> None:
    floating = metrics_of(f1_of, nn.Identity())
    interim = Interim(floating, lambda differences: "f1" in differences, range(20))
    part = metrics_of(f1_of, nn.Identity(), interim)
    assert part == {"f1": pytest.approx(f1(ANSWERS[:60], LABELS[:60]), abs=1e-6)}


def test_a_metric_that_is_returned_counts_as_it_is() -> None:
    metric = MeanMetric()
    metric.update([1.0, 3.0])
    found = metrics_of(lambda _: {"mean": metric}, nn.Identity())
    assert found == {"mean": 2.0}
    assert not found.contributions


def test_another_metric_in_each_part_is_refused() -> None:
    seen = Yielded()
    seen.add({"mean": MeanMetric()}, 1)
    with pytest.raises(EvaluationError, match="one metric as 'mean'"):
        seen.add({"mean": MeanMetric()}, 2)


def test_the_metric_says_in_which_direction_it_gets_worse(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="worse direction"):
        quantize(
            nn.Identity(), calibration_data=[torch.zeros(1)], output_dir=tmp_path, evaluate=f1_of, limits={"f1": 0.1}
        )
