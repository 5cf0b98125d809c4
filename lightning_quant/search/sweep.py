"""Several artifacts of one training: one table, the recommended first, and one figure of what each keeps and costs."""

import dataclasses
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_quant.artifact.artifact import Artifact
from lightning_quant.artifact.commit import TEMPORARY
from lightning_quant.errors import NoEffectWarning, QuantizationError
from lightning_quant.machine.disk import taking
from lightning_quant.report.page import table_page
from lightning_quant.report.scatter import Chart, Dot, scatter
from lightning_quant.search.pareto import Point, directions_of, front, recommended
from lightning_quant.terminal.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1
FILES = ("sweep.json", "sweep.md", "sweep.html")
# Metrics that the table has a column of, and letters of a reason.
_METRICS, _LETTERS = 3, 160


@dataclass(frozen=True)
class Sweep(Artifact):
    """The recommended artifact of several, and what was measured of all of them.

    Attributes:
        folder: that has the table, and below it a folder for each artifact.
        points: the recommended first, then those that nothing beats, the dominated, and what could not be made.
        directions: the metrics that points are compared by, and whether they are better when higher.
    """

    folder: Path
    points: tuple[Point, ...]
    directions: Mapping[str, bool]

    @property
    def artifacts(self) -> dict[str, Artifact]:
        """All that were made, by the names of their folders."""
        return {point.name: point.artifact for point in self.points if point.artifact is not None}

    def __repr__(self) -> str:
        """Return one line; the table is what `print` shows."""
        return f"Sweep({str(self.folder)!r}: {self._title()})"

    def __str__(self) -> str:
        """Return the table."""
        return self.text()

    def _repr_markdown_(self) -> str:
        return self.text()

    def text(self) -> str:
        """Return one table as Markdown, and by what its points are compared."""
        header, rows = self._table()
        return f"# {self._title()}\n\n{text_table(header, rows)}\n\n{self._said()}\n"

    def to_html(self) -> str:
        """Return the same as a page, with a figure against bytes and one against time."""
        header, rows = self._table()
        reasons = [f"{point.name}: {point.reason}" for point in self.points if point.reason]
        failures = [f"{point.name}: {text}" for point in self.points for text in point.failures]
        charts = [chart for chart in self.charts().values() if chart is not None]
        lists = [("What failed", reasons), ("What is not as asked for", failures)]
        return table_page(self._title(), header, rows, said=self._said(), charts=charts, lists=lists)

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts and lists that JSON can hold."""
        left_out = ("artifact", "contributions")
        points = [
            {f.name: getattr(point, f.name) for f in dataclasses.fields(point) if f.name not in left_out}
            for point in self.points
        ]
        folders = {name: artifact.path.name for name, artifact in self.artifacts.items()}
        head = {"schema_version": SCHEMA_VERSION, "recommended": self.points[0].name, "artifacts": folders}
        return {**head, "higher_is_better": dict(self.directions), "points": _plain(points)}

    def scalars(self) -> dict[str, float]:
        """Return quantity to number, for loggers: of every point its bytes and whether another one dominates it."""
        values = {"num_artifacts": float(len(self.artifacts))}
        for point in self.points:
            values[f"{point.name}/made"] = float(point.artifact is not None)
            values[f"{point.name}/recommended"] = float(point is self.points[0])
            values[f"{point.name}/dominated"] = float(bool(point.dominated_by))
        return values

    def charts(self) -> dict[str, Chart | None]:
        """Return the metric against bytes and against milliseconds, where there is something to draw."""
        metric = self.metric
        if metric is None:
            return {}
        best = self.points[0].name
        by_cost: dict[str, list[Dot]] = {"bytes": [], "ms": []}
        for point in self.points:
            if metric not in point.metrics:
                continue
            kind = "best" if point.name == best else "dominated" if point.dominated_by else "front"
            by_cost["bytes"].append(Dot(point.name, point.size_bytes, point.metrics[metric], kind))
            by_cost["ms"].append(Dot(point.name, point.slowest_ms, point.metrics[metric], kind))
        return {cost: scatter(cost, metric, dots) for cost, dots in by_cost.items()}

    def figures(self) -> dict[str, "Callable[[], Figure]"]:
        """Return name to what draws a picture with matplotlib."""
        charts = {name: chart for name, chart in self.charts().items() if chart is not None}
        return {"pareto": lambda: _drawn(charts)} if charts else {}

    @property
    def metric(self) -> str | None:
        """The metric that figures show: the first that points are compared by, or the first there is."""
        every = [*self.directions, *(name for point in self.points for name in point.metrics)]
        return next(iter(every), None)

    def _title(self) -> str:
        number = len(self.artifacts)
        return f"{number} artifact{'s' * (number != 1)} of one training, {self.points[0].name} recommended"

    def _said(self) -> str:
        names = ", ".join(self.directions)
        by = f"bytes, milliseconds and {names}" if names else "bytes and milliseconds"
        return (
            f"Points are compared by {by}: metrics by paired one-sided 95 % tests where each batch's contribution is "
            "known, and else by their values; times by their quartiles. A dominated point is worse than another in one "
            "of these, and better in none."
        )

    def _table(self) -> tuple[list[str], list[list[str]]]:
        names = list(dict.fromkeys([*self.directions, *(n for p in self.points for n in p.metrics)]))[:_METRICS]
        batches = sorted({b for p in self.points for b in p.latency_ms}, key=int)
        header = ["artifact", "recipe", "runtime", "bytes", "of float"]
        header += [cell for name in names for cell in (name, f"{name} - float")]
        header += [cell for b in batches for cell in (f"ms, batch {b}", f"times faster, batch {b}")]
        rows = [self._row(point, names, batches) for point in self.points]
        # Noise is no change of anything.
        told = [
            i for i, name in enumerate(header) if not name.endswith(" - float") or {row[i] for row in rows} != {"-"}
        ]
        return [*(header[i] for i in told), ""], [[*(row[i] for i in told), row[-1]] for row in rows]

    def _row(self, point: Point, names: Sequence[str], batches: Sequence[str]) -> list[str]:
        said = "recommended" if point is self.points[0] else ""
        said = f"dominated by {point.dominated_by}" if point.dominated_by else said
        said = "; ".join(filter(None, [said, *point.failures[:1]]))
        if point.reason:
            said = f"{'not measured' if point.artifact else 'not made'}: {point.reason[:_LETTERS]}"
        size = [f"{point.size_bytes:,}", _number(point.size_ratio)] if point.artifact else ["-", "-"]
        cells = [point.name, point.recipe, point.runtime, *size]
        for name in names:
            change = point.changes.get(name)
            cells += [_number(point.metrics.get(name)), "-" if change is None else f"{change:+.4g}"]
        for batch in batches:
            time = point.latency_ms.get(batch)
            cells += [_number(None if time is None else time[1]), _number(point.speedup.get(batch))]
        return [*cells, said]


def swept(
    folder: Path, points: Sequence[Point], known: Mapping[str, bool | None], objective: str | None = None
) -> Sweep:
    """Compare points, write the table to their folder, and return it.

    Args:
        folder: that has a folder for each artifact.
        points: one for each recipe and runtime.
        known: metric to whether it is better when higher, where that is known.
        objective: what the recommended point is best in; bytes times milliseconds by default.

    Raises:
        QuantizationError: nothing was made; the message has every reason.
    """
    directions = directions_of(points, known)
    beaten = front(points, directions)
    marked = [dataclasses.replace(point, dominated_by=beaten.get(point.name, "")) for point in points]
    best = recommended(marked, directions, objective)
    if best is None or best.artifact is None:
        raise QuantizationError(f"Expected an artifact of {len(points)} at least, but none was made: {why(points)}")

    def place(point: Point) -> tuple[bool, bool, bool, bool, int]:
        made = point.artifact is not None
        return (point is not best, not made, bool(point.failures), bool(point.dominated_by), point.size_bytes)

    made = Sweep(best.artifact.path, best.artifact.manifest, folder, tuple(sorted(marked, key=place)), directions)
    _write(made)
    return made


def why(points: Sequence[Point]) -> str:
    """Return the reasons of points that were not made; one alone where it is that of all."""
    reasons = {point.name: point.reason for point in points if point.reason}
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _write(made: Sweep) -> None:
    """Write table and page, each whole or not at all: without them there are the artifacts."""
    content = json.dumps(made.to_dict(), indent=2, allow_nan=False)
    try:
        with taking(made.folder, "the table of the artifacts"):
            made.folder.mkdir(parents=True, exist_ok=True)
            for name, text in zip(FILES, (content, made.text(), made.to_html()), strict=True):
                with tempfile.NamedTemporaryFile("w", dir=made.folder, prefix=TEMPORARY, encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    (made.folder / name).unlink(missing_ok=True)
                    os.link(file.name, made.folder / name)
    except (QuantizationError, OSError) as error:
        warnings.warn(f"The table of the artifacts was not written: {error}", NoEffectWarning, stacklevel=3)


def _drawn(charts: Mapping[str, Chart]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(charts), 3.5), layout="constrained")
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts.values(), strict=True):
        for label, x, y, kind, at_left in chart.dots:
            axes.scatter(x, -y, marker="*" if kind == "best" else "x" if kind == "dominated" else "o")
            axes.annotate(label, (x, -y), fontsize=7, ha="right" if at_left else "left")
        axes.set_xticks([place for place, _ in chart.x_ticks], [text for _, text in chart.x_ticks])
        axes.set_yticks([-place for place, _ in chart.y_ticks], [text for _, text in chart.y_ticks])
        axes.set(xlabel=chart.x_name, ylabel=chart.y_name)
    return figure


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"
