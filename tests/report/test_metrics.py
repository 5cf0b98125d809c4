"""The user's validation metrics in a report."""

import dataclasses
import math

import pytest
from reports import GOOD_VALUES, changed

from lightning_quant.report.metrics import MetricRow

METRICS, LATENCY = GOOD_VALUES["metrics"], GOOD_VALUES["latency"]


@pytest.mark.parametrize(
    ("row", "fails"),
    [
        # darts' Transformer, whose validation ran the training graph: a gain that is none.
        (MetricRow("val_loss", 0.9699, 0.9699, 0.9409, num_samples=200), True),
        (MetricRow("val_loss", 3.209, 3.212, 0.010), True),
        (MetricRow("val_accuracy", 0.9, 0.895, 0.89), False),
        # Two of sixteen predictions may tip, three may not.
        (MetricRow("val_accuracy", 0.9375, 0.9375, 0.8125, num_samples=16), False),
        (MetricRow("val_accuracy", 0.9375, 0.9375, 0.75, num_samples=16), True),
        (MetricRow("val_loss", 0.0, 0.0, 0.0), False),
        (MetricRow("val_loss", 1.0, 1.1, math.nan), True),
        (MetricRow("val_loss", 1.0, math.nan, math.nan), False),
        (MetricRow("val_loss", 1.0, 1.1, None), False),
        (MetricRow("val_loss", math.inf, math.inf, math.inf), False),
        (MetricRow("val_loss", 1.0, 1.0, math.inf), True),
    ],
)
def test_metric_far_from_the_simulated_one_is_failed_parity(row: MetricRow, fails: bool) -> None:
    report = changed(metrics=(row,))

    assert bool(report.failures) is fails
    assert report.scalars()["quant/parity_failed"] == float(fails)
    if fails:
        assert report.warnings[0].startswith(f"parity FAILED: {row.name} is ")
        assert "ran something else" in report.to_markdown().split("\n\n")[1]


def test_trained_weights_without_rounding_are_no_measure() -> None:
    row = MetricRow("val_loss", 1.0884, 0.6555, 0.75, num_samples=1000)

    assert changed(metrics=(row,)).failures == []
    assert len(changed(metrics=(row,), trained=True).failures) == 1


def test_float_is_named_for_what_it_is_after_training_through_rounding() -> None:
    row = MetricRow("val_loss", 1.0884, 0.6555, 0.6556)
    text = changed(metrics=(row,), trained=True).to_markdown()
    assert "| trained weights without rounding |" in text
    assert "no validation ran before rounding began" in text

    report = changed(metrics=(dataclasses.replace(row, before=0.6977),), trained=True)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.to_markdown().splitlines()]
    assert ["val_loss", "0.6977", "1.0884", "0.6555", "0.6556", "-0.4328"] in cells
    assert "float, before rounding began" in report.to_markdown()
    assert "no validation ran" not in report.to_markdown()
    assert report.scalars()["quant/float_before/val_loss"] == 0.6977


def test_delta_has_its_interval_where_one_is_known() -> None:
    row = MetricRow("val_loss", 0.5, 0.49, 0.48, margin=0.013)
    text = changed(metrics=(row, MetricRow("map", 0.5, 0.495, 0.49))).to_markdown()
    assert "-0.0200 ±0.0130 |" in text
    assert "-0.0100 |" in text
    assert "interval of 90 %" in text
    assert "±" not in changed(metrics=(MetricRow("map", 0.5, 0.495, 0.49),)).to_markdown()


def test_delta_is_artifact_minus_float() -> None:
    assert METRICS[0].delta == pytest.approx(-0.01)
    assert MetricRow("x", 0.5, None, None).delta is None
    assert MetricRow("x", None, 0.5, 0.5).delta is None
