"""The network of a plan as a picture: a node for each operator in the order of execution, and who reads whom."""

import math
from dataclasses import dataclass
from typing import Any

# Pixels of a row, between the lanes of links that pass others by, and of the box with a name; letters that fit in it.
_ROW, _LANE, _BOX, _LETTERS = 26, 7, 290, 34
# Pixels of the longest bar of multiply-adds, and lanes beyond which links lie on each other.
_BAR, _LANES = 110, 14


@dataclass(frozen=True)
class Node:
    """A box: a row of the plan with what is fused into it.

    Attributes:
        row: of the plan, as the page's table has it.
        number: of the row, from 1.
        label: its name, cut to what fits.
        y: of its upper end, in pixels.
        bar: length of its multiply-adds, in pixels.
        fused: kinds of the layers that run in it.
    """

    row: dict[str, Any]
    number: int
    label: str
    y: int
    bar: float
    fused: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """Where everything is.

    Attributes:
        nodes: in the order of execution.
        links: paths in the language of SVG.
        x: left end of the boxes.
        box: width of a box.
        row: height of a row.
        width: of all.
        height: of all.
    """

    nodes: tuple[Node, ...]
    links: tuple[str, ...]
    x: int
    box: int
    row: int
    width: int
    height: int


def drawn(rows: list[dict[str, Any]]) -> Drawing:
    """Lay rows of a plan out one below the other, links at their left.

    Args:
        rows: with "name", "kind", "action", "reason", "macs", and "reads" where that is known.
    """
    into = {row["name"]: row["reason"].removeprefix("into ") for row in rows if row["action"] == "fused"}
    names = [row["name"] for row in rows if row["action"] != "fused"]
    places = {name: place for place, name in reversed(list(enumerate(names)))}
    fused: dict[str, list[str]] = {}
    pairs: set[tuple[int, int]] = set()
    for row in rows:
        to = _main(row["name"], into)
        if row["action"] == "fused":
            fused.setdefault(to, []).append(row["kind"])
        for read in row.get("reads", ()):
            start, stop = places.get(_main(read, into), -1), places.get(to, -1)
            if 0 <= start < stop:
                pairs.add((start, stop))
    lanes = _lanes(sorted(pairs, key=lambda pair: (pair[1] - pair[0], pair)))
    x = 12 + _LANE * (min(_LANES, max(lanes.values(), default=0)) + 1)
    most = max((row["macs"] for row in rows), default=0) or 1
    kept = [(number, row) for number, row in enumerate(rows, 1) if row["action"] != "fused"]
    nodes = tuple(
        Node(row, n, _short(row["name"]), place * _ROW, _BAR * row["macs"] / most, tuple(fused.get(row["name"], ())))
        for place, (n, row) in enumerate(kept)
    )
    links = tuple(_link(*pair, min(_LANES, lane), x) for pair, lane in lanes.items())
    return Drawing(nodes, links, x, _BOX, _ROW, x + _BOX + _BAR + 180, max(1, len(nodes)) * _ROW)


def _main(name: str, into: dict[str, str]) -> str:
    """Return the operator that a row runs in: itself, or what it is fused into."""
    for _ in range(len(into)):
        if name not in into:
            break
        name = into[name]
    return name


def _lanes(pairs: list[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Return link to its lane, 0 for neighbours: the shortest are nearest to the boxes, and none lies on another."""
    lanes: dict[tuple[int, int], int] = {}
    taken: list[list[tuple[int, int]]] = []
    for start, stop in pairs:
        if stop == start + 1:
            lanes[start, stop] = 0
            continue
        free = (i for i, others in enumerate(taken) if all(stop <= a or b <= start for a, b in others))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((start, stop))
        lanes[start, stop] = lane + 1
    return lanes


def _link(start: int, stop: int, lane: int, x: int) -> str:
    top, bottom = start * _ROW + _ROW // 2, stop * _ROW + _ROW // 2
    if lane == 0:
        return f"M{x + 14} {top + 9}V{bottom - 9}"
    left, leave, enter = x - 4 - _LANE * lane, top + 4, bottom - 4
    down = f"Q{left} {leave} {left} {leave + 5}V{enter - 5}Q{left} {enter} {left + 5} {enter}"
    return f"M{x} {leave}H{left + 5}{down}H{x}"


def _short(name: str) -> str:
    if len(name) <= _LETTERS:
        return name
    half = _LETTERS // 2
    return f"{name[: half - 1]}…{name[-half:]}"


def bars(histogram: dict[str, Any], width: float, height: float) -> dict[str, Any]:
    """Return a histogram as bars with logarithmic heights, in pixels, and where its grid ends.

    Args:
        histogram: as report.json has it.
        width: of the picture.
        height: of the picture.
    """
    counts, start, stop = histogram["counts"], float(histogram["start"]), float(histogram["stop"])
    most, each = math.log1p(max(counts)), width / len(counts)
    ends = {name: width * (float(histogram[name]) - start) / (stop - start) for name in ("low", "high")}
    drawn = []
    for place, count in enumerate(counts):
        if count:
            middle, tall = (place + 0.5) * each, max(1.0, height * math.log1p(count) / most)
            inside = ends["low"] <= middle <= ends["high"]
            drawn.append((place * each, height - tall, each * 0.9, tall, "in" if inside else "out"))
    return {**ends, "bars": drawn}
