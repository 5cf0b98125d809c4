"""Layers over epochs, as a `QuantizationMonitor` saw them."""

import re

import pytest
from reports import changed

from lightning_quant.report.make_report import with_section
from lightning_quant.report.monitored import Look, Monitored, drawn

LOOKS = (
    Look(0.5, {"net.0": 40.0, "net.1": 38.0, "head": float("inf")}),
    Look(1.0, {"net.0": 12.0, "net.1": 39.0, "head": 41.0}),
    Look(2.0, {"net.0": 20.0, "net.1": 39.5, "head": 42.0}),
)


def test_the_worst_layers_are_told_with_their_worst_epoch() -> None:
    report = with_section(changed(), Monitored(LOOKS))
    lines = [re.sub(" +", " ", line) for line in report.to_markdown().splitlines()]
    assert "| net.0 | 40.0 | 12.0 | 1 | 20.0 |" in lines
    assert lines.index("| net.0 | 40.0 | 12.0 | 1 | 20.0 |") < lines.index("| net.1 | 38.0 | 38.0 | 0.5 | 39.5 |")
    assert with_section(changed(), None) == changed()


def test_lines_are_drawn_where_there_are_two_looks() -> None:
    looks = with_section(changed(), Monitored(LOOKS)).to_dict()["looks"]
    picture = drawn(looks)
    assert picture is not None
    assert {name: len(points.split()) for name, points, _ in picture.lines} == {"head": 2, "net.1": 3, "net.0": 3}
    low, high = min(place for place, _ in picture.x_ticks), max(place for place, _ in picture.x_ticks)
    for _, points, _ in picture.lines:
        for point in points.split():
            x, y = map(float, point.split(","))
            assert low <= x <= high
            assert 0 < y < picture.bottom
    assert drawn(looks[:1]) is None
    assert drawn([]) is None


def test_a_figure_for_loggers() -> None:
    pytest.importorskip("matplotlib")
    assert len(Monitored(LOOKS).figures()["monitor"]().axes[0].lines) == 3
    assert Monitored(()).figures() == {}
