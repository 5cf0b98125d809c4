"""Parity in a report."""

from reports import changed

from lightning_quant.simulate.parity import Parity

GOOD = changed()


BAD_PARITY = Parity("layer1.add", 0.42, 30.0, 12.0, 0.5)


def test_failed_parity_is_a_warning() -> None:
    operator, end_to_end = changed(parity=BAD_PARITY).warnings

    assert operator.startswith("parity FAILED: at layer1.add only 42.00% of the values")
    assert end_to_end.startswith("parity FAILED: the artifact is 12.0 dB from its simulation, which is 30.0 dB")


def test_failed_parity_is_a_scalar_too() -> None:
    assert changed(parity=BAD_PARITY).scalars()["quant/parity_failed"] == 1


def test_markdown_names_failed_parity() -> None:
    assert "Parity FAILED: every operator" not in GOOD.to_markdown()
    assert "FAILED" in changed(parity=BAD_PARITY).to_markdown().split("\n\n")[1]
