"""What operators cost, in a report."""

import dataclasses

from reports import changed

from lightning_quant.measure.advice import Advice
from lightning_quant.measure.sensitivity import OperatorSensitivity, Sensitivity

GOOD = changed()


LAYER = OperatorSensitivity(
    *("stem.0", "conv2d", 0.02, 0.001, 0.021, 0.004, 17.0, 0.0, 6.0, 0.001), widest=40.0, spread=3.0, float_bytes=12_000
)


def test_sensitivity_stands_in_the_report_where_it_was_asked_for() -> None:
    advice = Advice(("stem.0", "stem.3"), 0.004, 12_000)
    layers = (LAYER, dataclasses.replace(LAYER, name="head", without_error=0.019))
    found = Sensitivity(layers, 0.02, advice, {"val_acc": 0.008})
    text = changed(sensitivity=found).to_markdown()

    assert (
        "80% of the error comes from stem.0, weights, range 40 times its median channel; keep it and what "
        'shares its tensors float with `overrides={"stem.0": "float", "stem.3": "float"}`: '
        "val_acc +0.00800, +7.0 dB, +12 KB."
    ) in text
    assert text.index("| stem.0") < text.index("| head")
    assert changed(sensitivity=found).to_dict()["sensitivity"]["layers"][1]["name"] == "head"
    assert "of the error comes from" not in GOOD.to_markdown()
    assert "report.json" not in text
    many = Sensitivity(tuple(dataclasses.replace(LAYER, name=f"layer{index}") for index in range(30)), 0.02)
    text = changed(sensitivity=many).to_markdown()
    assert text.count("| layer") == 10 + 1  # and the header
    assert "The other 20 operators are in report.json." in text
