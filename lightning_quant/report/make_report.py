"""Measure an artifact: size, speed, operators and parity, each on the file itself."""

import dataclasses
import functools
from pathlib import Path

import torch
from torch import nn

from lightning_quant.artifact import artifact as artifacts
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.calls.loaded import LoadedModule
from lightning_quant.errors import QuantizationError
from lightning_quant.export.float_peers import FloatPeers
from lightning_quant.machine.latency import Timing, measure
from lightning_quant.machine.machine import cpu_name
from lightning_quant.machine.timed import timed
from lightning_quant.measure.attempts import noting
from lightning_quant.measure.bench import peak_of
from lightning_quant.measure.changed_predictions import Predictions
from lightning_quant.measure.float_memory import float_peak_of
from lightning_quant.measure.output_noise import FLOOR_DB, HeldOut, Noise, drawn_outputs, measure_noise
from lightning_quant.measure.sensitivity import Sensitivity
from lightning_quant.planned.inside import Answers, load_inside
from lightning_quant.planned.planned_model import Compared, PlannedModel
from lightning_quant.report.agreement import Agreement
from lightning_quant.report.closer_look import closer_look
from lightning_quant.report.coverage import Coverage
from lightning_quant.report.kept_limits import KeptLimits
from lightning_quant.report.limits import NO_LIMITS, Limits, missed
from lightning_quant.report.memory import Memory
from lightning_quant.report.metrics import MetricRow, Metrics
from lightning_quant.report.noise import NoiseSection
from lightning_quant.report.ranking import Ranking
from lightning_quant.report.remarks import Notes, Seconds
from lightning_quant.report.report import Report
from lightning_quant.report.section import Section
from lightning_quant.report.size import Size
from lightning_quant.report.speed import LatencyRow, Speed
from lightning_quant.surgery.host import moved_call
from lightning_quant.surgery.process import torch_threads
from lightning_quant.surgery.routing import evaluation_mode


def make_report(
    model: PlannedModel,
    artifact: Artifact,
    *,
    metrics: tuple[MetricRow, ...] = (),
    seconds: dict[str, float] | None = None,
    checkpoint_bytes: int | None = None,
    threads: int | None = None,
    notes: tuple[str, ...] = (),
    missing: tuple[str, ...] = (),
    sensitivity: Sensitivity | None = None,
    step_share: float = 1.0,
    trained: bool = False,
    held: HeldOut | None = None,
    limits: Limits | None = None,
    predictions: Predictions | None = None,
    peers: FloatPeers | None = None,
    chosen: bool = False,
) -> Report:
    """Measure an artifact against the float module it came from.

    Args:
        model: the trained or calibrated model, detached and on the CPU.
        artifact: private copy of what was exported from it.
        metrics: validation metrics, measured elsewhere.
        seconds: times of the stages so far.
        checkpoint_bytes: size of the training checkpoint.
        threads: for all latencies; torch's number of threads by default.
        notes: what else the reader should know.
        missing: what could not be measured so far, and why.
        sensitivity: which operator costs what, when that was asked for.
        step_share: share of the multiply-adds of the LightningModule's step that the module makes.
        trained: whether the weights were trained through rounding.
        held: calls to compare float and artifact on; the captured one where there are none.
        limits: what the artifact is to keep to.
        predictions: noted while validation ran.
        peers: float models that other artifacts of the same weights were timed beside.
        chosen: whether the runtime was chosen as the fastest, and timed beside float in every other then.
    """
    seconds, threads, lacking = dict(seconds or {}), threads or torch.get_num_threads(), list(missing)
    loaded = opened(model, artifact, threads)
    root, asked = (Answers(model.root), Answers(loaded)) if model.into_only else (model.root, loaded)
    with timed(seconds, "parity"):
        parity = _parity(model, asked, artifact.model_path, lacking)
        noise, unfit = _noise(model, root, asked, held, lacking)
        agreement, drawn = _agreement(model, parity, noise)
    with timed(seconds, "latency"):
        latency, remarks = _latency(model, loaded, threads, peers, lacking, elsewhere=not chosen)
    with timed(seconds, "closer look"):
        look = closer_look(model, (root, asked), artifact.model_path, threads, held=held, predictions=predictions)
    sections: tuple[Section, ...] = (
        Metrics(metrics, trained),
        _noise_section(model, noise, drawn or _way_out(model, sensitivity), judged=bool(metrics) or trained),
        Size(tensor_bytes(model.root), checkpoint_bytes, artifact.size_bytes),
        Speed(latency, model.plan.runtime, threads, cpu_name(), chosen),
        *(*_memory(model, artifact, threads, limits, lacking), agreement, look.changed),
        Notes((*notes, *_engine(artifact), *remarks, *unfit), tuple(lacking)),
        *(Ranking(sensitivity), _coverage(model, artifact, step_share), look.numbers, Seconds(seconds)),
    )
    return with_limits(_report(model, artifact, sections), limits or NO_LIMITS)


def _report(model: PlannedModel, artifact: Artifact, sections: tuple[Section, ...]) -> Report:
    return Report(model.recipe.name, model.plan.runtime, artifact.manifest["versions"], sections)


def with_limits(report: Report, limits: Limits) -> Report:
    """Return a report that is also held against limits."""
    kept = KeptLimits(limits, tuple(missed(report.to_dict(), limits)))
    return dataclasses.replace(report, sections=(*report.sections, kept))


def with_section(report: Report, section: Section | None) -> Report:
    """Return a report that also has a section behind its metrics, as of a search; the same where there is none."""
    first, *others = report.sections
    return report if section is None else dataclasses.replace(report, sections=(first, section, *others))


def opened(model: PlannedModel, artifact: Artifact, threads: int) -> LoadedModule:
    """Load an artifact; one without a program into a copy of the module that it was made of."""
    if model.into_only:
        return load_inside(model, artifact.path, artifact.model_files, artifact.signature, threads)
    return artifacts.open_model(artifact, threads=threads)


def _memory(
    model: PlannedModel, artifact: Artifact, threads: int, limits: Limits | None, lacking: list[str]
) -> tuple[Section, ...]:
    """Return the section of memory where a limit is on it; another process takes seconds to start."""
    if limits is None or not limits.on_memory:
        return ()
    peak, floating = None, None
    with noting(lacking, "the peak of memory is"):
        peak = peak_of(artifact, threads) / 2**20
    if peak is not None and limits.max_peak_memory_ratio is not None:
        with noting(lacking, "the peak of memory of float is"):
            floating = float_peak_of(model, artifact, threads) / 2**20
    return () if peak is None else (Memory(peak, floating),)


def _parity(model: PlannedModel, loaded: nn.Module, path: Path, lacking: list[str]) -> Compared | None:
    with noting(lacking, "parity FAILED: the comparison of the file with its simulation is"):
        return model.parity(loaded, path)
    return None


def _noise(
    model: PlannedModel, root: nn.Module, loaded: nn.Module, held: HeldOut | None, lacking: list[str]
) -> tuple[Noise | None, tuple[str, ...]]:
    with noting(lacking, "the noise of the outputs is"):
        return _measured_noise(model, root, loaded, held)
    return None, ()


def _measured_noise(
    model: PlannedModel, root: nn.Module, loaded: nn.Module, held: HeldOut | None
) -> tuple[Noise, tuple[str, ...]]:
    """Compare on held-out calls, or on the captured one where there are none or they are no calls of the artifact."""
    unfit: tuple[str, ...] = ()
    if held is not None and held.calls:
        calls = tuple(moved_call(*call) for call in held.calls)
        try:
            return measure_noise(root, loaded, HeldOut(calls, held.base)), ()
        except QuantizationError as error:
            unfit = (f"{held.base} does not fit the artifact, so noise was measured on the captured call: {error}",)
    captured = HeldOut((model.call(),), "the captured call, which took part in the choice of ranges")
    return measure_noise(root, loaded, captured), unfit


def _agreement(model: PlannedModel, parity: Compared | None, noise: Noise | None) -> tuple[Agreement, str]:
    """Return the section of parity; say that a module draws random numbers where that may be why they differ."""
    names: list[str] = []
    if (parity and parity.failures) or (noise and noise.warnings()):
        names = drawn_outputs(model.root, model.call())
    if not names:
        return Agreement(parity), ""
    which = ", ".join(f"`{name}`" for name in names)
    drawn = (
        f"In evaluation the float model draws random numbers, so that {which} is another each time: no comparison says "
        "anything of that. Draw in training alone, or take random numbers as an input"
    )
    return Agreement(parity, drawn), drawn


def _noise_section(model: PlannedModel, noise: Noise | None, way_out: str, *, judged: bool) -> NoiseSection:
    """Return the section of noise, held against what is usual where no metric judges the artifact."""
    return NoiseSection(noise, way_out, FLOOR_DB if judged else model.recipe.usual_db)


def _way_out(model: PlannedModel, sensitivity: Sensitivity | None) -> str:
    """Say what helps against noise: what sensitivity advises, where that was asked for."""
    if sensitivity is not None and sensitivity.advice is not None:
        return f"Keep {', '.join(sensitivity.advice.names)} float with `exclude`, as sensitivity advises"
    return model.recipe.against_noise


def _coverage(model: PlannedModel, artifact: Artifact, step_share: float) -> Coverage:
    """Return what the file computes in integers, as its runtime counts it, beside what was planned."""
    operators = model.runtime.count_operators(artifact.model_path)
    planned = tuple(operator for graph in model.plan.graphs for operator in graph.operators)
    in_integers = planned if any(row.action == "int8" for row in model.plan.rows) else ()
    left = model.runtime.still_float(in_integers, operators)
    return Coverage(model.plan.to_dict(), operators, left, step_share, model.least_stored_share)


def _engine(artifact: Artifact) -> tuple[str, ...]:
    return (artifact.manifest["engine"]["measured"],) if "engine" in artifact.manifest else ()


def tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers, shared ones counted once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _latency(
    model: PlannedModel,
    loaded: nn.Module,
    threads: int,
    peers: FloatPeers | None,
    lacking: list[str],
    *,
    elsewhere: bool,
) -> tuple[tuple[LatencyRow, ...], tuple[str, ...]]:
    with noting(lacking, "latencies are"):
        return measure_latency(model, loaded, threads, peers, elsewhere=elsewhere)
    return (), ()


def measure_latency(
    model: PlannedModel, loaded: nn.Module, threads: int, peers: FloatPeers | None = None, *, elsewhere: bool = False
) -> tuple[tuple[LatencyRow, ...], tuple[str, ...]]:
    """Time an artifact and its float peers in turn, at the smallest and the captured batch; add what stood in the way.

    Args:
        model: that was exported.
        loaded: the artifact.
        threads: of every contestant.
        peers: those of other artifacts of the same weights.
        elsewhere: whether to time float in other runtimes, too, where it may be faster than the artifact.
    """
    if peers is None:
        with FloatPeers() as own:
            return measure_latency(model, loaded, threads, own, elsewhere=elsewhere)
    remarks: tuple[str, ...] = ()
    with torch_threads(threads), evaluation_mode(model.root):
        try:
            runtime_float = peers.of(model, threads)
            if runtime_float is not None:
                args, kwargs = model.call(model.samples(model.smallest))
                runtime_float(*args, **kwargs)
        except QuantizationError as error:
            runtime_float, remarks = None, (f"the float model has no peer in {model.plan.runtime}: {error}",)
        own_float = {} if runtime_float is None else {"float": runtime_float}
        contestants = {"torch": model.root, **own_float, "artifact": loaded}
        rows = _timed(model, contestants, {}, peers.seconds)
        if elsewhere and any(row.is_close for row in rows):
            others, missing = peers.elsewhere(model, threads)
            rows = _timed(model, contestants, others, peers.seconds) if others else rows
            remarks += missing
            own_float |= others
    return rows, remarks + _precisions(own_float, model.plan.runtime)


def _precisions(floats: dict[str, nn.Module], own: str) -> tuple[str, ...]:
    """Say which float peers an engine computes in less than float32 unless it is told otherwise."""
    lower = {
        own if name == "float" else name: peer.precision
        for name, peer in floats.items()
        if isinstance(peer, LoadedModule) and peer.precision != "f32"
    }
    return tuple(f"float in {name} was timed in {kind}, which it takes by itself here" for name, kind in lower.items())


def _timed(
    model: PlannedModel, contestants: dict[str, nn.Module], others: dict[str, nn.Module], seconds: float
) -> tuple[LatencyRow, ...]:
    rows = []
    for batch in dict.fromkeys((model.smallest, model.num_samples)):
        args, kwargs = model.call(model.samples(batch))
        every = {**contestants, **{f"float in {name}": peer for name, peer in others.items()}}
        calls = {name: functools.partial(contestant, *args, **kwargs) for name, contestant in every.items()}
        timings: dict[str, Timing] = measure(calls, budget_s=seconds)
        elsewhere = {name: timings[f"float in {name}"] for name in others}
        rows.append(LatencyRow(batch, timings["torch"], timings.get("float"), timings["artifact"], elsewhere))
    return tuple(rows)
