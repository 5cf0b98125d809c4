"""What runs in integers, in a report."""

from typing import Any

import pytest
from reports import GOOD_VALUES, changed, row

GOOD = changed()


def test_operators_that_fell_back_to_float_are_a_warning() -> None:
    assert changed(still_float={"conv2d": 2}).warnings == ["2 planned int8 conv2d still run in float"]


def low(*rows: dict[str, Any], coverage: float, weight_coverage: float = 1.0, **values: Any) -> list[str]:
    plan = {**GOOD_VALUES["plan"], "rows": list(rows), "coverage": coverage, "weight_coverage": weight_coverage}
    return changed(plan=plan, **values).warnings


def test_little_in_integers_is_a_warning_with_what_would_help() -> None:
    rows = (row("conv", "Conv2d", "int8", "", 10, 90), row("rnn", "GRU", "float", "as a whole", 90, 10))
    (warning,) = low(*rows, coverage=0.1)
    assert warning.startswith(
        "only 10.0% of the multiply-adds run as 'int8' asks, most of the rest is in rnn (GRU: as a"
    )
    assert "int8_weight_only" in warning
    assert "int8_dynamic" in warning
    assert low(rows[0], row("rnn", "GRU", "float", "as a whole", 9, 10), coverage=0.55) == []


def test_layers_that_are_stored_compute_in_float() -> None:
    rows = (row("conv", "Conv2d", "int8", "", 10, 10), row("rnn", "GRU", "int8 weights", "", 90, 90))
    (warning,) = low(*rows, row("mean", "mean", "float", "nothing reads it"), coverage=0.1)
    assert "most of the rest is in rnn (GRU: int8 weights)" in warning


def test_few_stored_weights_are_a_warning_with_what_would_help() -> None:
    rows = (row("fc", "Linear", "int8", "", 10, 10), row("words", "Embedding", "float", "as a whole", 0, 90))
    (warning,) = low(*rows, coverage=1.0, weight_coverage=0.1)
    assert warning.startswith("only 10.0% of the weights' bytes are stored with fewer bits")
    assert "int8_weight_only" in warning


def test_what_the_user_keeps_float_is_no_warning() -> None:
    head = row("head", "Linear", "float", 'excluded by "head"', 90, 90, excluded=True)
    assert low(row("conv", "Conv2d", "int8", "", 10, 10), head, coverage=0.1, weight_coverage=0.1) == []


def test_the_share_of_the_whole_step_stands_beside_that_of_the_module() -> None:
    report = changed(step_share=0.02)
    assert report.scalars()["quant/coverage"] == 0.75
    assert report.scalars()["quant/step_coverage"] == pytest.approx(0.015)
    assert "The module makes 2.0% of the LightningModule's step: that is 1.5% of the multiply-adds" in str(report)
    assert "LightningModule's step" not in str(GOOD)
