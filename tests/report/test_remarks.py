"""Notes and times in a report."""

from lightning_quant.report.remarks import Notes, Seconds


def test_every_note_is_a_paragraph_of_one_line_without_markup() -> None:
    assert Notes(()).text() == ""
    assert Notes(("one", "two\nlines of `code`")).text().split("\n\n")[0] == "Note: one."
    assert "\n" not in Notes(("two\nlines",)).text()


def test_times_are_those_of_all_stages() -> None:
    seconds = Seconds({"export": 1.55, "parity": 0.2})
    assert seconds.text() == "Seconds: export 1.6, parity 0.2."
    assert seconds.scalars() == {"seconds/export": 1.55, "seconds/parity": 0.2}


def test_what_is_missing_is_a_warning() -> None:
    notes = Notes(("one",), ("latencies are missing: why",))
    assert notes.warnings() == ["latencies are missing: why"]
    assert "missing" not in notes.text()
