"""One sentence on an artifact, with what to do next."""

from reports import changed

from lightning_quant.report.metrics import MetricRow
from lightning_quant.report.verdict import verdict


def test_verdict_says_what_to_do() -> None:
    report = changed(latency=()).to_dict() | {"warnings": [], "failures": []}
    assert verdict(report)[0] == "good"
    assert "of the bytes" in verdict(report)[1]
    report["warnings"] = ["the artifact is larger than the float model", "slower"]
    assert verdict(report)[0] == "fair"
    assert "larger than the float model; look at what stays float, below" in verdict(report)[1]
    assert verdict(report)[1].endswith(". 1 more warning stands below.")
    report["failures"] = ["parity FAILED: 5 dB"]
    how, sentence = verdict(report)
    assert how == "bad"
    assert sentence.startswith('Do not deploy this file: parity FAILED: 5 dB; try runtime="auto"')
    report["failures"] = ["output is mostly noise. Keep it float"]
    assert verdict(report)[1] == "Do not deploy this file: output is mostly noise. Keep it float."


def test_a_change_is_told_in_the_size_of_its_metric() -> None:
    """An error of squares may double below the fourth decimal."""
    report = changed(latency=(), metrics=(MetricRow("val_mse", 2e-5, 4e-5, 4e-5),)).to_dict()
    report |= {"warnings": [], "failures": []}
    assert "val_mse +0.0000200 at 0.0000400" in verdict(report)[1]
    report["metrics"][0] |= {"float_value": 4e-5}
    assert "val_mse unchanged at 0.0000400" in verdict(report)[1]
