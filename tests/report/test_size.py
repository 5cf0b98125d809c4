"""Bytes in a report."""

from reports import changed


def test_larger_artifact_is_a_warning() -> None:
    report = changed(artifact_bytes=6000)

    assert report.warnings == ["the artifact is larger than the float model: 1.50 times its bytes"]


def test_artifact_as_large_as_float_is_none() -> None:
    assert changed(artifact_bytes=4000).warnings == []
