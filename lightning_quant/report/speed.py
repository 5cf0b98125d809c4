"""How long a call takes, of the artifact and of its float peers on this machine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_quant.machine.latency import Timing
from lightning_quant.report.section import Section
from lightning_quant.terminal.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LatencyRow:
    """Time of one call at one batch size.

    Attributes:
        batch: number of samples.
        torch_float: the float module in torch eager.
        runtime_float: the float module exported to the artifact's runtime; None when it does not export.
        artifact: the artifact.
    """

    batch: int
    torch_float: Timing
    runtime_float: Timing | None
    artifact: Timing

    @property
    def best_float_ms(self) -> float:
        """Median of the faster float peer."""
        return min(timing.median_ms for timing in (self.torch_float, self.runtime_float) if timing is not None)

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
    """

    latency: tuple[LatencyRow, ...]
    runtime: str
    threads: int
    cpu: str

    def text(self) -> str:
        """Return a table of medians and quartiles."""
        if not self.latency:
            return ""
        rows = [
            (str(r.batch), str(r.torch_float), str(r.runtime_float or "-"), str(r.artifact), f"{r.speedup:.2f}")
            for r in self.latency
        ]
        header = ("batch", "torch float, ms", f"{self.runtime} float, ms", "artifact, ms", "times faster")
        where = f"Median (quartiles) on {self.threads} thread{'s' * (self.threads != 1)}, {self.cpu}."
        return f"{text_table(header, rows)}\n\n{where}"

    def warnings(self) -> list[str]:
        """Say at which batch sizes the artifact is slower than float."""
        return [
            f"the artifact is slower than float at batch {row.batch}: {1 / row.speedup:.2f} times the time"
            for row in self.latency
            if row.speedup < 1
        ]

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

        names = {"torch_float": "torch float", "runtime_float": f"{self.runtime} float", "artifact": "artifact"}
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        for index, (field, name) in enumerate(names.items()):
            timings = [(at, getattr(row, field)) for at, row in enumerate(self.latency)]
            known = [(at + (index - 1) / 4, timing) for at, timing in timings if timing is not None]
            errors = [[t.median_ms - t.low_ms for _, t in known], [t.high_ms - t.median_ms for _, t in known]]
            axes.bar([at for at, _ in known], [t.median_ms for _, t in known], 0.25, yerr=errors, label=name)
        axes.set_xticks(range(len(self.latency)), [str(row.batch) for row in self.latency])
        axes.set(xlabel="batch", ylabel="ms, median and quartiles", yscale="log")
        axes.legend()
        return figure
