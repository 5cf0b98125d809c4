"""Outputs that are no floats: a tie is no fault, and a fault no tie."""

from dataclasses import replace

import pytest

from lightning_quant.simulate.integer_outputs import IntegerOutputs
from lightning_quant.simulate.parity import Parity


@pytest.mark.parametrize(
    ("outputs", "fails"),
    [
        (IntegerOutputs(0.0, 0.0), False),
        (IntegerOutputs(0.0, 0.01), True),
        (IntegerOutputs(0.2, 0.02), False),
        (IntegerOutputs(0.2, 0.021), True),
        (IntegerOutputs(0.2, 0.5, (0.4, 0.5) * 4), False),
        (IntegerOutputs(0.2, 0.9, (0.4, 0.5) * 4), True),
    ],
)
def test_as_many_may_differ_as_ties_leave_or_a_tenth_of_what_quantization_changes(
    outputs: IntegerOutputs, fails: bool
) -> None:
    assert bool(outputs.failure) == fails
    assert len(Parity("a", 1.0, 30.0, 60.0, None, integers=outputs).failures) == fails


def test_where_there_are_no_floats_no_decibels_are_told() -> None:
    outputs = IntegerOutputs(0.1, 0.0, alone=True)

    assert "dB" not in str(Parity("a", 1.0, float("inf"), float("inf"), None, integers=outputs))
    assert "100.00% equal integers of simulated and artifact, 90.00% of float" in str(
        Parity("a", 1.0, 30.0, 60.0, None, integers=replace(outputs, alone=False))
    )
