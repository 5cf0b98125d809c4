"""How long a call takes, of the artifact and of its float peers on this machine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_quant.machine.latency import Timing
from lightning_quant.report.section import Section
from lightning_quant.terminal.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Times faster than float in torch and its own runtime from which an artifact is not timed beside float in others. Of
# 20 nets on two runtimes that were, float in the other runtime was up to 1.7 times faster than in their own.
CLOSE = 2.0


@dataclass(frozen=True)
class LatencyRow:
    """Time of one call at one batch size.

    Attributes:
        batch: number of samples.
        torch_float: the float module in torch eager.
        runtime_float: the float module exported to the artifact's runtime; None when it does not export.
        artifact: the artifact.
        elsewhere: the float module exported to other runtimes, by name; none where the artifact is clearly faster, or
            slower, than the two peers above.
    """

    batch: int
    torch_float: Timing
    runtime_float: Timing | None
    artifact: Timing
    elsewhere: dict[str, Timing] = field(default_factory=dict)

    def floats(self, runtime: str) -> dict[str, Timing]:
        """Return all float peers by runtime; the artifact's own is this one."""
        own = {} if self.runtime_float is None else {runtime: self.runtime_float}
        return {"torch": self.torch_float, **own, **self.elsewhere}

    @property
    def best_float_ms(self) -> float:
        """Median of the fastest float peer."""
        return min(timing.median_ms for timing in self.floats("").values())

    @property
    def is_close(self) -> bool:
        """Whether the artifact is faster than float by so little that float in another runtime may be faster."""
        return 1 <= self.speedup < CLOSE

    @property
    def speedup(self) -> float:
        """Best float median divided by the artifact's median."""
        return self.best_float_ms / self.artifact.median_ms


@dataclass(frozen=True)
class Speed(Section):
    """Latency by batch size.

    Attributes:
        latency: one for each batch size.
        runtime: of the artifact and of the second float peer.
        threads: of every contestant.
        cpu: name of the processor.
        chosen: whether the runtime was chosen as the fastest of all.
    """

    latency: tuple[LatencyRow, ...]
    runtime: str
    threads: int
    cpu: str
    chosen: bool = False

    def text(self) -> str:
        """Return a table of medians and quartiles."""
        if not self.latency:
            return ""
        others = list(self.latency[0].elsewhere)
        rows = [
            (
                *(str(r.batch), str(r.torch_float), str(r.runtime_float or "-")),
                *(*(str(r.elsewhere[name]) for name in others), str(r.artifact), f"{r.speedup:.2f}"),
            )
            for r in self.latency
        ]
        floats = [f"{name} float, ms" for name in ("torch", self.runtime, *others)]
        header = ("batch", *floats, "artifact, ms", "times faster")
        where = f"Median (quartiles) on {self.threads} thread{'s' * (self.threads != 1)}, {self.cpu}."
        return f"{text_table(header, rows)}\n\n{where}"

    def warnings(self) -> list[str]:
        """Say at which batch sizes the artifact is slower than float, where float is faster, and what helps."""
        # By what two decimals show: "1.00 times the time" is no warning.
        slower = [row for row in self.latency if round(1 / row.speedup, 2) > 1]
        if not slower:
            return []
        best = [min(row.floats(self.runtime).items(), key=lambda peer: peer[1].median_ms)[0] for row in slower]
        where = [
            f"in {name} at batch {row.batch} ({1 / row.speedup:.2f} times the time)"
            for name, row in zip(best, slower, strict=True)
        ]
        helps = "" if self.chosen else ': runtime="auto" takes the fastest of the installed runtimes'
        return [f"the artifact is slower than float {' and '.join(where)}{helps}"]

    def scalars(self) -> dict[str, float | None]:
        """Return milliseconds of the artifact and of the best float peer, and how many times faster it is."""
        values: dict[str, float | None] = {}
        for row in self.latency:
            values[f"latency_ms/batch_{row.batch}"] = row.artifact.median_ms
            values[f"float_latency_ms/batch_{row.batch}"] = row.best_float_ms
            values[f"speedup/batch_{row.batch}"] = row.speedup
        return values

    def figures(self) -> dict[str, "Callable[[], Figure]"]:
        """Return bars of milliseconds for every contestant and batch size."""
        return {"latency": self._bars} if self.latency else {}

    def _bars(self) -> "Figure":
        from matplotlib.figure import Figure

        bars = [{f"{name} float": t for name, t in row.floats(self.runtime).items()} for row in self.latency]
        bars = [{**known, "artifact": row.artifact} for known, row in zip(bars, self.latency, strict=True)]
        width = 0.75 / len(bars[0])
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        for index, name in enumerate(bars[0]):
            places = [at + index * width - (0.75 - width) / 2 for at in range(len(bars))]
            timings = [row[name] for row in bars]
            errors = [[t.median_ms - t.low_ms for t in timings], [t.high_ms - t.median_ms for t in timings]]
            axes.bar(places, [t.median_ms for t in timings], width, yerr=errors, label=name)
        axes.set_xticks(range(len(self.latency)), [str(row.batch) for row in self.latency])
        axes.set(xlabel="batch", ylabel="ms, median and quartiles", yscale="log")
        axes.legend()
        return figure
