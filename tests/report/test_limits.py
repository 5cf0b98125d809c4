"""Limits on any metric, by name and direction, and the summary that machines read."""

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import NUM_CLASSES, Classifier, fit
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassF1Score

from lightning_quant import PostTrainingQuantization, quantize
from lightning_quant.cli import cli
from lightning_quant.errors import NoEffectWarning, QuantizationError
from lightning_quant.measure.evaluate import evaluate
from lightning_quant.report.limits import Limits, limits_from, missed, missed_limits
from lightning_quant.report.metrics import MetricRow


def artifact(*rows: MetricRow, **report: Any) -> Any:
    metrics = [dataclasses.asdict(row) for row in rows]
    return SimpleNamespace(
        path="q",
        manifest={"recipe": "int8", "runtime": "onnxruntime"},
        size_bytes=1234,
        plan={"coverage": 1.0},
        report={"metrics": metrics, "size_ratio": 0.25, "scalars": {"quant/speedup/batch_1": 1.5}, **report},
    )


def row(name: str, before: float | None, after: float | None, higher_is_better: bool | None = None) -> MetricRow:
    return MetricRow(name, before, before, after, higher_is_better=higher_is_better)


@pytest.mark.parametrize(
    ("metric", "limits", "missed"),
    [
        (row("val_f1", 0.9, 0.85, True), {"max_drop": {"val_f1": 0.06}}, None),
        (row("val_f1", 0.9, 0.85, True), {"max_drop": {"val_f1": 0.01}}, r"val_f1 fell by 0\.0500, more than 0\.01"),
        (row("val_f1", 0.9, 0.99, True), {"max_drop": {"val_f1": 0.01}}, None),
        (
            row("perplexity", 57.0, 59.0, False),
            {"max_drop": {"perplexity": 1}},
            r"perplexity rose by 2\.0000, more than 1",
        ),
        (row("perplexity", 57.0, 50.0, False), {"max_drop": {"perplexity": 1}}, None),
        (row("mAP", 0.5, 0.4), {"max_drop": {"mAP": 0.05}}, r"not known whether mAP .* `higher_is_better`"),
        (row("mAP", 0.5, 0.4), {"max_drop": {"mAP": 0.05}, "higher_is_better": ["mAP"]}, r"mAP fell by 0\.1000"),
        (row("mAP", 0.5, 0.4), {"max_drop": {"mAP": 0.05}, "lower_is_better": ["mAP"]}, None),
        # What the user says counts more than what was known.
        (row("odd", 0.5, 0.4, False), {"max_drop": {"odd": 0.05}, "higher_is_better": ["odd"]}, r"odd fell by"),
        (
            row("val_f1", 0.9, 0.9, True),
            {"max_drop": {"val_f2": 0.1}},
            r"no metric 'val_f2' was measured, but val_f1; 'val_f1' was probably meant",
        ),
        (
            row("val_f1", 0.9, None, True),
            {"max_drop": {"val_f1": 0.1}},
            r"val_f1 was not measured of float and artifact",
        ),
        (row("val_acc", 0.9, 0.8), {"max_accuracy_drop": 0.05}, r"val_acc fell by 0\.1000"),
        (row("val_f1", 0.9, 0.8), {"max_accuracy_drop": 0.05}, r"no metric with `acc` in its name"),
    ],
)
def test_metrics_are_held_to_their_limit_by_name_and_direction(
    metric: MetricRow, limits: Any, missed: str | None
) -> None:
    found = missed_limits(artifact(metric), Limits(**limits))
    assert len(found) == (missed is not None)
    if missed is not None:
        assert found[0].startswith("q: ")
        assert re.search(missed, found[0])


@pytest.mark.parametrize(
    "limits",
    [
        {"max_size_ratio": "0.3"},
        {"min_speedup": float("nan")},
        {"max_drop": {"val_f1": True}},
        {"max_drop": {"val_f1": None}},
        {"max_drop": 0.01},
        {"higher_is_better": ["a"], "lower_is_better": ["a"]},
        {"higher_is_better": "val_f1"},
        {"val_f1": "0.01"},
        {"val_f1": float("nan")},
        {"size_ratio": 0.0},
        {1: 0.01},
        0.01,
        ["val_f1"],
    ],
)
def test_limits_that_mean_nothing_are_refused(limits: Any) -> None:
    with pytest.raises(QuantizationError, match=r"Expected `limits"):
        limits_from(limits)


def test_a_misspelt_limit_is_answered_with_the_right_name() -> None:
    with pytest.raises(QuantizationError, match="Did you mean 'max_size_ratio'"):
        limits_from({"max_size_ration": 0.3})


def test_metrics_are_held_against_float_before_training_began_to_round() -> None:
    # Trained through rounding, the weights do worse without it: against them nothing seems lost.
    trained = MetricRow("val_f1", 0.7, 0.8, 0.8, before=0.9, higher_is_better=True)
    assert "since rounding began" in missed_limits(artifact(trained), Limits({"val_f1": 0.05}))[0]
    assert missed_limits(artifact(trained), Limits({"val_f1": 0.11})) == []


# --- where they are given


@pytest.mark.usefixtures("unmeasured")
def test_limits_of_a_callback_are_held_by_its_report_and_by_every_command(
    kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = {"max_drop": {"val_accuracy": 2.0, "score": 0.0}, "higher_is_better": ["score"], "max_size_ratio": 0.001}
    callback = kind(output_dir=tmp_path, limits=limits)
    with pytest.warns(NoEffectWarning, match=r"limits FAILED: its size ratio is") as warned:
        trainer = fit(Classifier(), callback)

    assert not [w for w in warned if "score" in str(w.message) or "accuracy" in str(w.message)]
    assert callback.artifact.report["limits"]["max_drop"] == limits["max_drop"]
    assert trainer.callback_metrics["quant/limits_missed"] == 1
    for command in ("report", "compare", "verify"):
        assert cli.main([command, str(tmp_path)]) == 1
        assert "limits FAILED: its size ratio" in capsys.readouterr().err


@pytest.mark.usefixtures("unmeasured")
def test_limits_on_what_no_validation_logs_are_known_before_training(tmp_path: Path) -> None:
    callback = PostTrainingQuantization(output_dir=tmp_path, limits={"max_drop": {"val_los": 0.1}})
    seen: list[int] = []
    callback.on_train_start = lambda trainer, _: seen.append(len(warned))  # type: ignore[method-assign]
    with pytest.warns(NoEffectWarning, match=r"val_los.*, but val_loss, .* 'val_loss' was probably meant") as warned:
        fit(Classifier(), callback, num_sanity_val_steps=1)
    assert "val_los, which validation has not logged" in str(warned[seen[0] - 1].message)


@pytest.mark.usefixtures("unmeasured")
def test_limits_of_a_function_without_validation_are_on_size_and_speed(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"calibration_data": torch.randn(4, 3), "output_dir": tmp_path}
    with pytest.raises(
        QuantizationError, match="`quantize` runs none: use its `evaluate`, or PostTrainingQuantization"
    ):
        quantize(torch.nn.Linear(3, 2), limits={"max_drop": {"val_f1": 0.1}}, **arguments)
    with pytest.warns(NoEffectWarning, match="limits FAILED: its size ratio"):
        quantize(torch.nn.Linear(3, 2), limits={"max_size_ratio": 0.001}, **arguments)
    with pytest.raises(MisconfigurationException, match="evaluate=False"):
        PostTrainingQuantization(evaluate=False, limits={"max_accuracy_drop": 0.1})


def test_a_peak_of_memory_is_held_against_its_limit() -> None:
    limits = limits_from({"peak_memory_mb": 20})
    assert limits == Limits(max_peak_memory_mb=20)
    for scalars, said in (
        ({"quant/peak_memory_mb": 19.5}, []),
        ({"quant/peak_memory_mb": 20.6}, ["a process takes 20.6 MiB at its peak, more than 20"]),
        ({}, ["no peak of memory was measured"]),
    ):
        assert missed({"scalars": scalars}, limits) == said


def test_a_ratio_of_memory_is_held_against_its_limit() -> None:
    limits = limits_from({"peak_memory_ratio": 0.5})
    assert limits == Limits(max_peak_memory_ratio=0.5)
    for scalars, said in (
        ({"quant/peak_memory_mb": 9.0, "quant/peak_memory_ratio": 0.5}, []),
        (
            {"quant/peak_memory_mb": 9.0, "quant/peak_memory_ratio": 0.75},
            ["a process takes 0.750 of float's memory at its peak, more than 0.5"],
        ),
        ({"quant/peak_memory_mb": 9.0}, ["no peak of memory of float was measured"]),
        ({}, ["no peak of memory was measured"]),
    ):
        assert missed({"scalars": scalars}, limits) == said
    for wrong in (0, -0.5, math.inf):
        with pytest.raises(QuantizationError, match=r"limits\.peak_memory_ratio.* above zero"):
            limits_from({"peak_memory_ratio": wrong})
    with pytest.raises(QuantizationError, match="Did you mean 'peak_memory_ratio'"):
        limits_from({"peak_memory_rati": 0.5})


# --- directions


class Scored(Classifier):
    """Logs a score of torchmetrics, one that has no direction, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.f1, self.seen = MulticlassF1Score(NUM_CLASSES), MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        x, y = batch
        self.f1(self.net(x), y)
        self.seen(torch.ones(1))
        self.log("val_f1", self.f1)
        self.log("seen", self.seen)


def test_torchmetrics_says_which_way_is_better() -> None:
    module = Scored()
    found = evaluate(fit(module, max_steps=1), module, "net")

    assert {"val_f1", "seen", "val_loss"} <= set(found)
    assert found.higher_is_better["val_f1"] is True
    assert "seen" not in found.higher_is_better
