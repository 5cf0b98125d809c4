import json
from pathlib import Path

import pytest

from lightning_quant.artifact.artifact import Artifact
from lightning_quant.errors import NoEffectWarning, QuantizationError
from lightning_quant.search.pareto import Point
from lightning_quant.search.sweep import swept, why


def points(folder: Path) -> list[Point]:
    made = []
    for name, size, accuracy, ms in (("slow", 30, 0.9, 3.0), ("good", 10, 0.9, 1.0), ("small", 5, 0.5, 1.0)):
        artifact = Artifact(folder / name, {"recipe": name, "runtime": "torch"})
        metrics, times = {"accuracy": accuracy, "loss": float("nan")}, {"4": (0.9 * ms, ms, 1.1 * ms)}
        more = {"changes": {"accuracy": accuracy - 0.9}, "speedup": {"4": 2.0}}
        made.append(Point(name, name, "torch", artifact, "", metrics, size_bytes=size, latency_ms=times, **more))  # type: ignore[arg-type]
    return [Point("none", "int8", "torch", reason="it <b>failed</b> | here"), *made]


def test_one_table_with_the_recommended_first_and_what_failed_last(tmp_path: Path) -> None:
    made = swept(tmp_path, points(tmp_path), {"accuracy": True, "loss": None})
    assert [point.name for point in made.points] == ["good", "small", "slow", "none"]
    assert made.path == tmp_path / "good"
    assert list(made.artifacts) == ["good", "small", "slow"]
    lines = made.text().splitlines()
    assert "recommended" in lines[4]
    assert "dominated by good" in lines[6]
    assert "not made: it \\<b>failed\\</b> \\| here" in lines[7]
    assert (tmp_path / "sweep.md").read_text() == made.text()
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["recommended"] == "good"
    assert [point["dominated_by"] for point in content["points"]] == ["", "", "good", ""]
    page = (tmp_path / "sweep.html").read_text()
    # Against bytes and against milliseconds.
    assert page.count("<circle") == 6
    assert "<b>failed" not in page
    assert made.scalars()["good/recommended"] == made.scalars()["slow/dominated"] == 1.0
    assert list(tmp_path.iterdir()).__len__() == 3
    figure = made.figures()["pareto"]()
    assert len(figure.axes) == 2


def test_nothing_made_is_an_error_with_every_reason(tmp_path: Path) -> None:
    every = [Point(name, name, "torch", reason=f"{name} failed") for name in ("a", "b")]
    with pytest.raises(QuantizationError, match="a: a failed; b: b failed"):
        swept(tmp_path, every, {})
    assert why([Point("a", "", "", reason="no"), Point("b", "", "", reason="no")]) == "no"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_takes_no_file_costs_the_table_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    with pytest.warns(NoEffectWarning, match="was not written"):
        made = swept(tmp_path / "folder", points(tmp_path), {})
    assert made.points[0].name == "small"
