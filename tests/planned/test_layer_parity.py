"""An artifact of layers keeps what the layers in memory do."""

import json
import math

import pytest
from reports import of_layers

from lightning_quant.planned.layer_parity import LayerParity


@pytest.mark.parametrize(
    ("quantization_db", "float_artifact_db", "fails"),
    [(30.0, 29.0, False), (30.0, 26.5, True), (90.0, 61.0, False), (90.0, 59.0, True), (20.0, math.nan, True)],
)
def test_parity_of_layers(quantization_db: float, float_artifact_db: float, fails: bool) -> None:
    parity = LayerParity(quantization_db, 40.0, float_artifact_db, None)
    report = of_layers(parity=parity)
    assert bool(report.warnings) is fails
    assert report.scalars()["quant/parity_failed"] == float(fails)
    assert ("Parity FAILED" if fails else "Parity ok") in report.to_markdown()
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("unequal", "fails"), [((0.0, 0.0), False), ((0.0, 0.06), True), ((0.1, 0.2), False), ((0.1, 0.3), True)]
)
def test_integer_outputs_may_differ_little_more_than_in_memory(unequal: tuple[float, float], fails: bool) -> None:
    assert bool(LayerParity(30.0, 40.0, 30.0, None, unequal).failures) is fails
