"""What the report says of changed predictions."""

from lightning_quant.measure.changed_predictions import ChangedPredictions, ChangedSample
from lightning_quant.report.changed import Changed

SAMPLE = ChangedSample(0, 1, 0.5, 0.1)


def test_it_says_how_many_and_what_brings_them_back() -> None:
    found = Changed(ChangedPredictions(1000, 4, (SAMPLE, SAMPLE), 9, {"a": 2, "b": 1, "c": 1, "d": 1}, "validation"))

    assert found.text() == (
        "4 of 1,000 predictions changed, on validation; of 2 that were looked at, kept float alone brings back: a 2, b "
        "1, c 1."
    )
    assert found.scalars() == {"changed_share": 0.004}


def test_it_says_so_where_no_operator_does_or_nothing_changed() -> None:
    found = Changed(ChangedPredictions(10, 1, (SAMPLE,), 9, {}, "validation"))
    assert "none of 9 operators, kept float alone, brings one of 1 back" in found.text()
    assert Changed(ChangedPredictions(10, 0, (), 0, {}, "validation")).text() == Changed(None).text() == ""
    assert Changed(None).scalars() == {}
