"""Where the picture of a network has its boxes and links."""

import re
from typing import Any

import pytest
from reports import row

from lightning_quant.report.network import bars, drawn


def rows(*reads: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{**row(f"op{i}", "Conv2d", "int8", macs=10 * i), "reads": list(r)} for i, r in enumerate(reads)]


def test_links_that_pass_others_by_have_lanes_of_their_own() -> None:
    found = drawn(rows((), ("op0",), ("op1", "op0"), ("op2", "op0"), ("op3", "op2")))
    straight = [path for path in found.links if "H" not in path]
    around = [path for path in found.links if "H" in path]

    assert [node.y for node in found.nodes] == [0, 26, 52, 78, 104]
    assert (len(straight), len(around)) == (4, 3)
    lefts = [int(re.search(r"Q(\d+)", path)[1]) for path in around]  # type: ignore[index]
    # Two of them overlap; the third is beside the first.
    assert len(set(lefts)) == 2
    assert all(0 < left < found.x for left in lefts)


def test_what_is_fused_stands_in_its_operator() -> None:
    conv, read = row("conv", "Conv2d", "int8"), row("next", "Conv2d", "int8")
    norm, relu = row("bn", "BatchNorm2d", "fused", "into conv"), row("relu", "ReLU", "fused", "into bn")
    given = [conv, {**norm, "reads": ["conv"]}, {**relu, "reads": ["bn"]}, {**read, "reads": ["relu"]}]
    found = drawn(given)

    assert [(node.label, node.fused, node.number) for node in found.nodes] == [
        ("conv", ("BatchNorm2d", "ReLU"), 1),
        ("next", (), 4),
    ]
    assert len(found.links) == 1


def test_names_that_fuse_in_circles_end_and_long_ones_are_cut() -> None:
    first, second = row("a", "ReLU", "fused", "into b"), row("b", "ReLU", "fused", "into a")
    long = row("block." * 40 + "conv", "Conv2d", "int8")
    found = drawn([{**first, "reads": ["b"]}, second, long])

    assert len(found.nodes) == 1
    assert len(found.nodes[0].label) <= 34
    assert found.nodes[0].label.endswith("block.conv")
    assert drawn([]).nodes == ()


def test_bars_of_a_histogram() -> None:
    given = {"counts": [5, 0, 100, 5], "start": -1.0, "stop": 3.0, "low": -0.9, "high": 1.9}
    found = bars(given, 200, 80)

    assert (found["low"], found["high"]) == pytest.approx((5.0, 145.0))
    assert [(x, where) for x, _, _, _, where in found["bars"]] == [(0, "in"), (100, "in"), (150, "out")]
    assert max(tall for _, _, _, tall, _ in found["bars"]) == 80
