"""Artifacts as dots: what they keep of a metric against what they cost, for pages without a script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Pixels of the field that dots lie in, of its margins, and of a letter of a label.
_WIDTH, _HEIGHT, _LEFT, _BELOW, _LETTER = 420.0, 220.0, 62.0, 34.0, 5.6
# Share of the span that stays free at each end.
_FREE = 0.08
_TICKS = 4


@dataclass(frozen=True)
class Dot:
    """One artifact.

    Attributes:
        label: its name.
        x: what it costs, above zero.
        y: what it keeps.
        kind: "best", "front", "dominated" or "float", which says how it looks.
    """

    label: str
    x: float
    y: float
    kind: str


@dataclass(frozen=True)
class Chart:
    """Where everything is, in pixels.

    Attributes:
        title: what is drawn against what.
        x_name: of the horizontal axis, which is logarithmic.
        y_name: of the vertical one.
        dots: label, place, kind, and whether the label stands at the left of the dot.
        x_ticks: place and text.
        y_ticks: likewise.
        width: of the whole picture.
        height: likewise.
        left: end of the field.
        bottom: likewise.
    """

    title: str
    x_name: str
    y_name: str
    dots: tuple[tuple[str, float, float, str, bool], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: float = _LEFT + _WIDTH + 8
    height: float = _HEIGHT + _BELOW + 8
    left: float = _LEFT
    bottom: float = _HEIGHT + 4


def scatter(x_name: str, y_name: str, dots: Sequence[Dot]) -> Chart | None:
    """Lay dots out, cost to the right and on a logarithmic axis, metric upwards; None for fewer than two.

    Args:
        x_name: what `x` is, with its unit.
        y_name: what `y` is.
        dots: those that are no numbers are left out.
    """
    known = [dot for dot in dots if math.isfinite(dot.y) and math.isfinite(dot.x) and dot.x > 0]
    if len(known) < 2:
        return None
    xs, ys = _Axis.of([math.log10(dot.x) for dot in known]), _Axis.of([dot.y for dot in known])
    placed = []
    for dot in known:
        x, y = _LEFT + _WIDTH * xs.share(math.log10(dot.x)), 4 + _HEIGHT * (1 - ys.share(dot.y))
        placed.append((dot.label, x, y, dot.kind, x + _LETTER * len(dot.label) > _LEFT + _WIDTH))
    shares = [index / _TICKS for index in range(_TICKS + 1)]
    x_ticks = tuple((_LEFT + _WIDTH * share, _short(10 ** xs.at(share))) for share in shares)
    y_ticks = tuple((4 + _HEIGHT * (1 - share), f"{ys.at(share):.4g}") for share in shares)
    return Chart(f"{y_name} against {x_name}", x_name, y_name, tuple(placed), x_ticks, y_ticks)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "_Axis":
        low, high = min(values), max(values)
        free = _FREE * (high - low) or max(abs(high), 1.0) * _FREE
        return cls(low - free, high + free)

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def at(self, share: float) -> float:
        return self.low + share * (self.high - self.low)


def _short(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
