"""What rounding would have cost while training, over the epochs, where a `QuantizationMonitor` looked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_quant.report.section import Section
from lightning_quant.terminal.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Layers that are printed and drawn, and pixels of the picture, of its margins and of the room for names.
_NUM_WORST = 6
_WIDTH, _HEIGHT, _LEFT, _BELOW, _NAMES = 460.0, 220.0, 44.0, 34.0, 210.0
_LETTERS = 32


@dataclass(frozen=True)
class Look:
    """A look at all layers.

    Attributes:
        epoch: when, in epochs.
        db: layer to decibels that rounding leaves its median channel, of what it reads or of its weight.
    """

    epoch: float
    db: dict[str, float]


@dataclass(frozen=True)
class Monitored(Section):
    """Layers while training.

    Attributes:
        looks: the earliest first; empty where nobody looked.
    """

    looks: tuple[Look, ...]

    def text(self) -> str:
        """Return a table of the layers that were worst at the end."""
        rows = []
        for name, points in _worst([(look.epoch, look.db) for look in self.looks]):
            epoch, least = min(points, key=lambda point: point[1])
            rows.append((name, *(f"{db:.1f}" for db in (points[0][1], least)), f"{epoch:.3g}", f"{points[-1][1]:.1f}"))
        header = ("layer while training, dB after rounding", "first", "least", "in epoch", "last")
        return text_table(header, rows) if rows else ""

    def figures(self) -> "dict[str, Callable[[], Figure]]":
        """Return decibels over epochs."""
        return {"monitor": self._drawn} if self.looks else {}

    def _drawn(self) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        for name, points in _worst([(look.epoch, look.db) for look in self.looks]):
            # No mathematical text in names that somebody else chose.
            axes.plot(*zip(*points, strict=True), label=name.replace("$", r"\$"))
        axes.set(xlabel="epoch", ylabel="dB after rounding")
        axes.legend(fontsize="small")
        return figure


def _worst(looks: list[tuple[float, dict[str, Any]]]) -> list[tuple[str, list[tuple[float, float]]]]:
    """Return the layers that are worst in the last look, each with epochs and finite decibels."""
    points: dict[str, list[tuple[float, float]]] = {}
    for epoch, db in looks:
        for name, value in db.items():
            # Infinities are texts in a report.
            if isinstance(value, float) and abs(value) != float("inf"):
                points.setdefault(name, []).append((float(epoch), value))
    return sorted(points.items(), key=lambda item: item[1][-1][1])[:_NUM_WORST]


@dataclass(frozen=True)
class Lines:
    """Where everything is, in pixels.

    Attributes:
        lines: name, points of a polyline, and where the name stands.
        x_ticks: place and text.
        y_ticks: likewise.
        width: of the whole picture.
        height: likewise.
        left: end of the field.
        right: likewise.
        bottom: likewise.
    """

    lines: tuple[tuple[str, str, float], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: float = _LEFT + _WIDTH + _NAMES
    height: float = _HEIGHT + _BELOW
    left: float = _LEFT
    right: float = _LEFT + _WIDTH
    bottom: float = _HEIGHT


def drawn(looks: list[dict[str, Any]]) -> Lines | None:
    """Return a picture of the looks in a report, for a page without a script; None of fewer than two looks."""
    worst = _worst([(look["epoch"], look["db"]) for look in looks])
    every = [point for _, points in worst for point in points]
    if len({epoch for epoch, _ in every}) < 2:
        return None
    (first, last), (low, high) = ((min(values), max(values)) for values in zip(*every, strict=True))
    low, high = low - 1, high + 1

    def x(epoch: float) -> float:
        return _LEFT + _WIDTH * (epoch - first) / (last - first)

    def y(db: float) -> float:
        return 4 + (_HEIGHT - 4) * (high - db) / (high - low)

    lines = []
    # Names one below the other where lines end together.
    free = 0.0
    for name, points in sorted(worst, key=lambda item: y(item[1][-1][1])):
        free = max(free + 13, y(points[-1][1]) + 4)
        short = name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}"
        lines.append((short, " ".join(f"{x(epoch):.1f},{y(db):.1f}" for epoch, db in points), free))
    shares = [share / 4 for share in range(5)]
    x_ticks = tuple((x(e), f"{e:.3g}") for e in (first + share * (last - first) for share in shares))
    return Lines(tuple(lines), x_ticks, tuple((y(d), f"{d:.0f}") for d in (low + s * (high - low) for s in shares)))
