"""What quantization cost and gained: numbers with their origin, for terminals, files and loggers."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_quant.latency import Timing
from lightning_quant.layer_parity import LayerParity
from lightning_quant.limits import NO_LIMITS, Limits, missed
from lightning_quant.metric_rows import MetricRow, metric_failures
from lightning_quant.output_noise import Noise
from lightning_quant.parity import Parity
from lightning_quant.plan_summary import low_coverage, summarize
from lightning_quant.tables import one_line, text_table

if TYPE_CHECKING:
    from lightning_quant.accuracy.sensitivity import Sensitivity


# Operators whose sensitivity is printed.
_NUM_WORST = 10


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
class Report:
    """All that was measured of one artifact.

    Attributes:
        recipe: its recipe.
        runtime: its runtime.
        cpu: name of the processor.
        threads: number of threads of every contestant.
        versions: of the libraries that took part.
        float_bytes: bytes of the float parameters and buffers of the module.
        checkpoint_bytes: size of the training checkpoint on disk; None when there is none.
        artifact_bytes: size of the model on disk.
        metrics: the user's validation metrics.
        latency: by batch size.
        parity: artifact against simulation; None when it was not checked.
        still_float: kind to number of planned integer operators that the runtime runs in float.
        operators: operator type to number in the optimized session.
        seconds: stage to time it took.
        plan: the plan as nested dicts.
        notes: what else a reader should know.
        min_stored_share: share of the weights' values that a recipe of layers must store with fewer bits; None for
            others.
        sensitivity: which operator costs what, where that was asked for.
        step_share: share of the multiply-adds of the LightningModule's step that the module makes, in [0, 1].
        trained: whether the weights were trained through rounding, so that without it they are no float model's.
        noise: float against artifact, for every output; None when it was not measured.
        way_out: what helps against noise, in words.
        limits: what the artifact was to keep to.
    """

    recipe: str
    runtime: str
    cpu: str
    threads: int
    versions: dict[str, str | None]
    float_bytes: int
    checkpoint_bytes: int | None
    artifact_bytes: int
    metrics: tuple[MetricRow, ...]
    latency: tuple[LatencyRow, ...]
    parity: Parity | LayerParity | None
    still_float: dict[str, int]
    operators: dict[str, int]
    seconds: dict[str, float]
    plan: dict[str, Any]
    notes: tuple[str, ...] = ()
    min_stored_share: float | None = None
    sensitivity: "Sensitivity | None" = None
    step_share: float = 1.0
    trained: bool = False
    noise: Noise | None = None
    way_out: str = ""
    limits: Limits = NO_LIMITS

    @property
    def size_ratio(self) -> float:
        """Artifact divided by float parameters and buffers, in bytes."""
        return self.artifact_bytes / self.float_bytes

    @property
    def failures(self) -> list[str]:
        """Why the artifact is not what was asked for or simulated, in plain words; empty when it is."""
        found = list(self.parity.failures) if self.parity else []
        found += metric_failures(self.metrics, trained=self.trained)
        found = [f"parity FAILED: {failure}" for failure in found]
        if self.min_stored_share is not None and self.plan["stored_share"] < self.min_stored_share:
            found.append(
                f"{self.recipe} FAILED: only {self.plan['stored_share']:.1%} of the weights' values are stored with "
                f"fewer bits, less than {self.min_stored_share:.0%}"
            )
        return found + [f"limits FAILED: {text}" for text in missed(self._measured(), self.limits)]

    @property
    def warnings(self) -> list[str]:
        """What went wrong, in plain words, worst first."""
        found = self.failures
        if self.noise is not None:
            found += [f"{text}. {self._way_out()}" for text in self.noise.warnings]
        if not any(text.startswith(self.recipe) for text in found):
            found += low_coverage(self.plan)
        if self.size_ratio > 1:
            found.append(f"the artifact is larger than the float model: {self.size_ratio:.2f} times its bytes")
        found += [
            f"the artifact is slower than float at batch {row.batch}: {1 / row.speedup:.2f} times the time"
            for row in self.latency
            if row.speedup < 1
        ]
        found += [f"{count} planned int8 {kind} still run in float" for kind, count in self.still_float.items()]
        return found

    def _measured(self) -> dict[str, Any]:
        """Return what limits are held against, by the keys of `to_dict`."""
        speedups = {f"quant/speedup/batch_{row.batch}": row.speedup for row in self.latency}
        metrics = [dataclasses.asdict(row) for row in self.metrics]
        return {"metrics": metrics, "size_ratio": self.size_ratio, "scalars": speedups}

    def scalars(self, prefix: str = "quant") -> dict[str, float]:
        """Return the numbers for a logger: `<prefix>/<quantity>`."""
        values: dict[str, float | None] = {
            "quant/float_bytes": self.float_bytes,
            "quant/artifact_bytes": self.artifact_bytes,
            "quant/size_ratio": self.size_ratio,
            "quant/checkpoint_bytes": self.checkpoint_bytes,
            "quant/coverage": self.plan["coverage"],
            "quant/step_coverage": self.plan["coverage"] * self.step_share,
            "quant/weight_coverage": self.plan["weight_coverage"],
        }
        for row in self.metrics:
            name = row.name.replace(" ", "_")
            values |= {f"quant/float/{name}": row.float_value, f"quant/simulated/{name}": row.simulated}
            values |= {f"quant/artifact/{name}": row.artifact, f"quant/delta/{name}": row.delta}
            values[f"quant/float_before/{name}"] = row.before
        for time in self.latency:
            values[f"quant/latency_ms/batch_{time.batch}"] = time.artifact.median_ms
            values[f"quant/float_latency_ms/batch_{time.batch}"] = time.best_float_ms
            values[f"quant/speedup/batch_{time.batch}"] = time.speedup
        if self.parity is not None:
            if isinstance(self.parity, Parity) and self.parity.worst_share is not None:
                values["quant/parity_worst_share"] = self.parity.worst_share
            values["quant/parity_failed"] = float(any(text.startswith("parity ") for text in self.failures))
        if self.limits != NO_LIMITS:
            values["quant/limits_missed"] = float(len([text for text in self.failures if text.startswith("limits ")]))
        if self.noise is not None:
            values |= {f"quant/{name}": value for name, value in self.noise.scalars().items()}
        values |= {f"quant/seconds/{stage}": value for stage, value in self.seconds.items()}
        return {name.replace("quant", prefix, 1): float(v) for name, v in values.items() if v is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts and lists that JSON can hold."""
        derived = {"size_ratio": self.size_ratio, "warnings": self.warnings, "failures": self.failures}
        derived["scalars"] = self.scalars()
        return _finite({**dataclasses.asdict(self), **derived})

    def to_markdown(self) -> str:
        """Return the report as it stands in report.md and in the terminal."""
        parts = [f"# {one_line(self.recipe)} on {self.runtime}"]
        parts += [f"**Warning:** {one_line(warning)}." for warning in self.warnings]
        parts += [self._summary(), self._metric_table(), self._noise_text(), self._latency_table(), self._parity_text()]
        parts += [f"Note: {one_line(note)}." for note in self.notes]
        parts += [self._sensitivity_text()]
        parts += [summarize(self.plan, self.operators, self.step_share), self._seconds_text()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def __str__(self) -> str:
        return self.to_markdown()

    def _summary(self) -> str:
        rows = [("float weights", _bytes(self.float_bytes), "1.00")]
        if self.checkpoint_bytes:
            rows.append(
                (
                    "training checkpoint",
                    _bytes(self.checkpoint_bytes),
                    f"{self.checkpoint_bytes / self.float_bytes:.2f}",
                )
            )
        rows.append(("artifact", _bytes(self.artifact_bytes), f"{self.size_ratio:.2f}"))
        return text_table(("size on disk", "bytes", "ratio"), rows)

    def _metric_table(self) -> str:
        if not self.metrics:
            return ""
        begun = self.trained and any(row.before is not None for row in self.metrics)
        header = ("validation", *["float, before rounding began"] * begun)
        header += ("trained weights without rounding" if self.trained else "float", "simulated", "artifact", "delta")
        rows = []
        for r in self.metrics:
            values = [*[r.before] * begun, r.float_value, r.simulated, r.artifact]
            rows.append((r.name, *map(_number, values), _number(r.delta, sign=True)))
        return text_table(header, rows) + self._about_trained(begun)

    def _about_trained(self, begun: bool) -> str:
        if not self.trained:
            return ""
        told = "" if begun else " What a float model reaches is not known: no validation ran before rounding began."
        return f"\n\nDelta is that to the trained weights without rounding, which are no float model's weights.{told}"

    def _latency_table(self) -> str:
        if not self.latency:
            return ""
        rows = [
            (str(r.batch), str(r.torch_float), str(r.runtime_float or "-"), str(r.artifact), f"{r.speedup:.2f}")
            for r in self.latency
        ]
        header = ("batch", "torch float, ms", f"{self.runtime} float, ms", "artifact, ms", "times faster")
        where = f"Median (quartiles) on {self.threads} thread{'s' * (self.threads != 1)}, {self.cpu}."
        return f"{text_table(header, rows)}\n\n{where}"

    def _way_out(self) -> str:
        """Say what helps: what sensitivity advises, where that was asked for."""
        advice = None if self.sensitivity is None else self.sensitivity.advice
        if advice is None:
            return self.way_out
        return f"Keep {', '.join(advice.names)} float with `exclude`, as sensitivity advises"

    def _noise_text(self) -> str:
        return "" if self.noise is None else str(self.noise)

    def _parity_text(self) -> str:
        return "" if self.parity is None else one_line(str(self.parity))

    def _sensitivity_text(self) -> str:
        if self.sensitivity is None:
            return ""
        worst = dataclasses.replace(self.sensitivity, layers=self.sensitivity.layers[:_NUM_WORST])
        left = len(self.sensitivity.layers) - len(worst.layers)
        return f"{worst}\n\nThe other {left} operators are in report.json." if left else str(worst)

    def _seconds_text(self) -> str:
        return "Seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in self.seconds.items()) + "."


def _bytes(value: int) -> str:
    return f"{value:,}"


def _number(value: float | None, *, sign: bool = False) -> str:
    return "-" if value is None else f"{value:+.4f}" if sign else f"{value:.4f}"


def _finite(value: Any) -> Any:
    """Write infinities and NaN as text, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value
