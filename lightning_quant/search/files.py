"""What can be tried: choices of a model, each exported to a folder of its own and validated there."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_quant.artifact import artifact as artifacts
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.errors import QuantizationError
from lightning_quant.export.engines import AUTO
from lightning_quant.export.export import export
from lightning_quant.machine.disk import scratch_folder
from lightning_quant.machine.latency import ONE_THREAD, measure
from lightning_quant.measure.bench import peak_of
from lightning_quant.measure.contributions import Difference, Metrics, differences
from lightning_quant.measure.float_memory import float_peak_of
from lightning_quant.measure.interim import Decides, PartialMetrics
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.planned.sizes import ChosenShapes
from lightning_quant.report.make_report import measure_latency, tensor_bytes
from lightning_quant.search.candidates import Makes
from lightning_quant.search.choice import Choice, Measured
from lightning_quant.search.quicker import quicker, transitions
from lightning_quant.search.relaxations import Refined, Relaxations
from lightning_quant.surgery.process import torch_threads

# Seconds that files are timed for in turn, and rounds at most: by 50 of 0.2 ms two files alike were 10 % apart.
_TIMING_S, _MOST_ROUNDS = 0.5, 2000
Validate = Callable[[PlannedModel, Artifact, Decides | None], Metrics]


@dataclass
class Files:
    """The space of a search on exported files.

    Attributes:
        floating: metrics of the float model, with contributions.
        validate: gives those of a file, of a part of the data where that decides.
        on_host: gives a model over the module that is exported, on the CPU.
        whole: the whole recipe, ready to be exported.
        candidates: makes the others.
        rank: measures what safer schemes gain.
        timed: whether latencies are measured.
        weighed: whether the peak of memory is.
        weighs_float: whether that of float is, too.
        threads: for those.
        dynamic_shapes: as for `export`.
        engine: likewise.
        models: what was made, by choice.
    """

    floating: Metrics
    validate: Validate
    on_host: Callable[[PlannedModel], PlannedModel]
    whole: PlannedModel
    candidates: Makes
    rank: Callable[[], Relaxations]
    timed: bool = False
    weighed: bool = False
    weighs_float: bool = False
    threads: int | None = None
    dynamic_shapes: ChosenShapes = None
    engine: str = AUTO
    models: dict[Choice, PlannedModel] = field(default_factory=dict)
    _relaxations: Relaxations | None = None
    _float_peak: int | None = None

    def model(self, choice: Choice) -> PlannedModel:
        """Return the model of a choice, made once.

        Raises:
            QuantizationError: nothing is left to quantize, or a layer cannot be kept as chosen.
        """
        if choice not in self.models:
            whole = choice == Choice()
            self.models[choice] = self.whole if whole else self.on_host(self.candidates.make(choice))
        return self.models[choice]

    def measure(self, choice: Choice, decides: Decides | None = None) -> Measured:
        """Export a choice and validate the file, on no more data than decide."""
        model = self.model(choice)
        model.observe_unreached()
        with scratch_folder() as folder:
            artifact = export(model, folder / "trial", dynamic_shapes=self.dynamic_shapes, engine=self.engine)
            metrics = self.validate(model, artifact, decides)
            latency, speedup = self._latency(model, artifact) if self.timed else ({}, {})
            memory = self._memory(model, artifact) if self.weighed else {}
            size = artifact.size_bytes
        floating, share = self.floating, 1.0
        if isinstance(metrics, PartialMetrics):
            floating, share = metrics.floating, metrics.share
        apart = differences(metrics, floating)
        if not model.plan.num_quantized:
            # What rounds nothing differs by nothing that more data could show.
            apart = {name: Difference(one.value, 0.0) for name, one in apart.items()}
        ratio = size / tensor_bytes(model.root)
        times = latency, speedup, transitions(model.plan)
        return Measured(dict(metrics), apart, size, ratio, *times, share, **memory)

    def accurate(self) -> Choice | None:
        """Return the whole recipe with more done for accuracy; None where there is no more."""
        return self.candidates.accurate()

    def steps(self) -> Sequence[Choice]:
        """Return choices that keep more and more out of the recipe, ranked once."""
        return Refined(self._ranked())

    def cheaper(self, fails: Choice, keeps: Choice) -> Choice | None:
        """Return a choice that costs less by the ranking, and leaves hardly more noise."""
        return self._ranked().cheaper(fails, keeps)

    def quicker(self, base: Choice) -> Choice | None:
        """Return a choice whose file takes less time, with what is slower in integers than in float kept in float."""
        with _Opened(self) as opened:
            return quicker(self.candidates.operators(), base, opened.time_ratio)

    def all_float(self) -> Choice | None:
        """Return what keeps everything in float; None where that is none of the choices."""
        return self.candidates.all_float()

    def times(self, choices: Sequence[Choice]) -> list[float]:
        """Return the milliseconds of each choice's file, of the captured call, all timed in turn."""
        with _Opened(self) as opened:
            return opened.times(choices)

    def _ranked(self) -> Relaxations:
        if self._relaxations is None:
            self._relaxations = self.rank()
        return self._relaxations

    def _memory(self, model: PlannedModel, artifact: Artifact) -> dict[str, Any]:
        """Return what `Measured` holds of memory, or why there is none: one without a program runs in no process."""
        threads, peak, ratio = self.threads or torch.get_num_threads(), None, None
        try:
            peak = peak_of(artifact, threads)
            if self.weighs_float:
                self._float_peak = self._float_peak or float_peak_of(model, artifact, threads)
                ratio = peak / self._float_peak
        except QuantizationError as error:
            return {"peak_memory_mb": peak and peak / 2**20, "no_peak": str(error)}
        return {"peak_memory_mb": peak / 2**20, "peak_memory_ratio": ratio}

    def _latency(self, model: PlannedModel, artifact: Artifact) -> tuple[dict[str, float], dict[str, float]]:
        threads = self.threads or 1
        rows, _ = measure_latency(model, artifacts.open_model(artifact, threads=threads), threads)
        return {str(r.batch): r.artifact.median_ms for r in rows}, {str(r.batch): r.speedup for r in rows}


class _Opened:
    """Files of choices, written and loaded once while they are compared."""

    def __init__(self, files: Files) -> None:
        self._files, self._threads = files, files.threads or 1
        self._calls: dict[Choice, tuple[contextlib.ExitStack, Callable[[], Any]]] = {}

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self._keep(())

    def time_ratio(self, one: Choice, other: Choice) -> float:
        """Return the time of one choice's file by that of another's; only these two stay loaded."""
        self._keep((one, other))
        first, second = self.times((one, other))
        return first / second

    def times(self, choices: Sequence[Choice]) -> list[float]:
        """Return the milliseconds of each choice's file, all timed in turn."""
        with torch_threads(self._threads):
            calls = {str(place): self._call(choice) for place, choice in enumerate(choices)}
            clock = ONE_THREAD if self._threads == 1 else time.perf_counter
            timings = measure(calls, budget_s=_TIMING_S, max_rounds=_MOST_ROUNDS, clock=clock)
        return [timings[place].median_ms for place in calls]

    def _call(self, choice: Choice) -> Callable[[], Any]:
        if choice not in self._calls:
            files, model = self._files, self._files.model(choice)
            model.observe_unreached()
            with contextlib.ExitStack() as stack:
                folder = stack.enter_context(scratch_folder()) / "timed"
                artifact = export(model, folder, dynamic_shapes=files.dynamic_shapes, engine=files.engine)
                args, kwargs = model.call(model.samples(model.num_samples))
                call = functools.partial(artifacts.open_model(artifact, threads=self._threads), *args, **kwargs)
                self._calls[choice] = stack.pop_all(), call
        return self._calls[choice][1]

    def _keep(self, choices: Sequence[Choice]) -> None:
        for choice in [choice for choice in self._calls if choice not in choices]:
            self._calls.pop(choice)[0].close()
