"""From a float module and calls of it to a measured artifact, or to one of each of several recipes and runtimes."""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_quant import runtimes
from lightning_quant.artifact import artifact as artifacts
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.artifact.labels import class_labels
from lightning_quant.calibrate.calibrate import calibrate
from lightning_quant.calls.calls import Call
from lightning_quant.capture.batch_readings import run_call
from lightning_quant.capture.calibration_data import CalibrationCalls
from lightning_quant.doors.evaluated import Evaluated, searched
from lightning_quant.doors.settings import Settings
from lightning_quant.errors import CalibrationError, NoEffectWarning
from lightning_quant.export.auto import choose_runtime
from lightning_quant.export.engines import AUTO
from lightning_quant.export.export import export
from lightning_quant.export.float_peers import TIMING_S, FloatPeers
from lightning_quant.export.prepare import prepare
from lightning_quant.export.working_part import working_part
from lightning_quant.graph.table import Selection
from lightning_quant.machine.timed import timed
from lightning_quant.measure.attempts import noting
from lightning_quant.measure.changed_predictions import Predictions, alone
from lightning_quant.measure.contributions import Metrics
from lightning_quant.measure.output_noise import HeldOut, held_back
from lightning_quant.measure.sensitivity import NUM_CALLS, Sensitivity, rank_operators
from lightning_quant.measure.thumbnails import tokenizer_of
from lightning_quant.numerics.adjustments import outcomes
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.planned.sizes import notes_of_sizes
from lightning_quant.planned.way_inside import way_inside
from lightning_quant.recipe.recipe import LayerRecipe, Recipe
from lightning_quant.report.make_report import make_report, with_section
from lightning_quant.report.page import to_html
from lightning_quant.search.judge import Judge
from lightning_quant.search.pareto import Point, point_of
from lightning_quant.search.section import SearchSection
from lightning_quant.search.sweep import Sweep, swept
from lightning_quant.simulate.prepared import Prepared


@dataclasses.dataclass(frozen=True)
class Made:
    """A model to export, and what is known of it by then.

    Attributes:
        model: calibrated, or its layers quantized.
        held: calls that chose nothing.
        notes: what the report should say.
        sensitivity: which operator costs what, where that was asked for.
        search: how it was found, where it was.
        missing: what could not be measured, and why.
    """

    model: PlannedModel
    held: list[Call]
    notes: tuple[str, ...]
    sensitivity: Sensitivity | None = None
    search: SearchSection | None = None
    missing: tuple[str, ...] = ()


def check_runs(settings: Settings) -> None:
    """Refuse a recipe that its runtime does not run.

    Raises:
        QuantizationError: it does not.
    """
    if settings.runtime != AUTO:
        runtimes.check_recipe(settings.runtime, settings.recipe)


def make_artifacts(
    model: nn.Module, judged: Evaluated, data: CalibrationCalls, every: Mapping[str, Settings], folder: Path
) -> Sweep:
    """Make an artifact of each of several settings from the same calls, compare them, and return the recommended.

    Args:
        model: the float module.
        judged: its metrics, and what gives them of files.
        data: to calibrate with, read once.
        every: settings, by the name of the folder below `folder`.
        folder: gets the table.

    Raises:
        QuantizationError: none could be made; the message has every reason.
    """
    points: list[Point] = []
    calls, stopped = list(data), False
    with FloatPeers(TIMING_S) as peers:
        for name, settings in every.items():
            none = Point(name, settings.recipe.name, settings.runtime, reason="interrupted")
            own = dataclasses.replace(judged, settings=settings)
            try:
                points.append(none if stopped else _point(model, own, data, name, folder, calls, peers))
            except KeyboardInterrupt:
                stopped = True
                points.append(none)
            # Whatever a library raises for one: the others must not be lost for it.
            except Exception as error:
                reason = str(error) or repr(error)
                warnings.warn(f"{name}: {reason}", NoEffectWarning, stacklevel=3)
                points.append(dataclasses.replace(none, reason=reason))
    judge = Judge(judged.settings.limits, judged.floating.higher_is_better)
    known = {metric: judge.direction(metric) for point in points for metric in point.metrics}
    return swept(folder, points, known, judged.settings.objective)


def _point(
    model: nn.Module,
    judged: Evaluated,
    data: CalibrationCalls,
    name: str,
    folder: Path,
    calls: list[Call],
    peers: FloatPeers,
) -> Point:
    check_runs(judged.settings)
    place = artifacts.check_folder(folder / name)
    artifact, measured = make_artifact(model, judged, data, judged.settings, place, calls, peers)
    return point_of(name, artifact, measured)


def make_artifact(
    model: nn.Module,
    judged: Evaluated,
    data: CalibrationCalls,
    settings: Settings,
    folder: Path,
    calls: Iterable[Call] | None = None,
    peers: FloatPeers | None = None,
) -> tuple[Artifact, Metrics]:
    """Calibrate, convert, export and measure; return the artifact and its metrics.

    Args:
        model: the float module.
        judged: its metrics, and what gives them of files.
        data: to calibrate with.
        settings: recipe, runtime, and what is wanted of them.
        folder: the artifact's, checked.
        calls: those of the data where they were read before.
        peers: float models that other artifacts of the same weights were timed beside.
    """
    given = iter(data if calls is None else calls)
    first = list(itertools.islice(given, 1))
    with way_inside(settings.recipe, settings.runtime, functools.partial(_working_child, model, first, settings)):
        return _made_and_measured(model, judged, data, settings, folder, itertools.chain(first, given), peers)


def _working_child(model: nn.Module, first: list[Call], settings: Settings) -> str:
    if not first or str(settings.runtime) not in runtimes.names():
        return ""
    part = working_part(model, first[0], settings.recipe, str(settings.runtime), settings.selection)
    if part is None:
        return ""
    how = f" with{part.patterns.removeprefix(',')}" if part.patterns else ""
    return (
        f"Its child {part.name!r}, with {part.share:.0%} of the weights, works: quantize that{how}, on calls of its "
        "own; what `load` returns takes its place."
    )


def _made_and_measured(
    model: nn.Module,
    judged: Evaluated,
    data: CalibrationCalls,
    settings: Settings,
    folder: Path,
    calls: Iterable[Call],
    peers: FloatPeers | None,
) -> tuple[Artifact, Metrics]:
    seconds: dict[str, float] = {}
    made = _quantized(model, judged, iter(calls), settings, folder, seconds)
    how: dict[str, Any] = {"dynamic_shapes": settings.dynamic_shapes, "engine": settings.engine, "release": True}
    artifact = export(made.model, folder, classes=class_labels(model), seconds=seconds, **how)
    notes = (*made.notes, *outcomes(made.model.accuracy_steps), *data.notes, *notes_of_sizes(made.model))
    one, tokenizer = functools.partial(alone, made.model), tokenizer_of(made.model.root)
    predictions = Predictions(one, tokenizer, shown=settings.show_samples)
    # Measured on a copy: another run may replace the artifact meanwhile.
    with artifacts.private_copy(artifact) as own:
        metrics, failed, values = judged.rows(made.model, own)
        report = make_report(
            made.model,
            own,
            metrics=metrics,
            seconds=seconds,
            threads=settings.threads,
            notes=notes,
            missing=(*made.missing, *failed),
            sensitivity=made.sensitivity,
            held=HeldOut(tuple(made.held), "the last call, which took no part in calibration"),
            limits=settings.limits,
            predictions=predictions,
            peers=peers,
            chosen=str(settings.runtime) == AUTO,
        )
        report = with_section(report, made.search)
        artifact = artifacts.add_report(artifact, report.to_dict(), report.to_markdown(), to_page=to_html, own=own)
    for text in report.warnings:
        warnings.warn(f"{artifact.path}: {text}.", NoEffectWarning, stacklevel=4)
    return artifact, values


def _quantized(
    model: nn.Module,
    judged: Evaluated,
    calls: Iterator[Call],
    settings: Settings,
    folder: Path,
    seconds: dict[str, float],
) -> Made:
    recipe, selection, notes = settings.recipe, settings.selection, tuple[str, ...]()
    missing = list[str]()
    first = next(calls, None)
    if first is None:
        raise CalibrationError("Expected `calibration_data` to hold at least one call, but it is empty.")
    make: Callable[..., PlannedModel] = _calibrated if recipe.needs_calibration else _quantize_layers
    calls, chosen = itertools.chain([first], calls), str(settings.runtime)
    if chosen == AUTO:
        data = list(calls)
        plan = lambda name: make(model, recipe, name, selection, iter(data), {})  # noqa: E731
        choice = choose_runtime(plan, settings.threads, settings.dynamic_shapes)
        chosen, notes, calls = choice.runtime, (choice.note,), iter(data)
        missing += choice.warnings
    # A recipe with accuracy steps holds one of its calls back for itself.
    held: list[Call] = []
    calls = held_back(calls, recipe.needed_calls, held)
    few = list(itertools.islice(calls, NUM_CALLS)) if settings.sensitivity else []
    calls = itertools.chain(few, calls)
    seen = list(calls) if settings.searches else []
    quantized = make(model, recipe, chosen, selection, iter(seen) if seen else calls, seconds)
    for call in held:
        quantized.note_sizes(*call)
    ranked, search = None, None
    if settings.sensitivity:
        with noting(missing, "sensitivities are"):
            ranked = rank_operators(Prepared.of(quantized), few)
    if settings.searches:
        quantized, search = searched(judged, quantized, seen, held, folder, seconds)
    return Made(quantized.on_host(), held, notes, ranked, search, tuple(missing))


def _calibrated(
    model: nn.Module,
    recipe: Recipe,
    runtime: str,
    selection: Selection,
    calls: Iterator[Call],
    seconds: dict[str, float],
) -> Prepared:
    with timed(seconds, "capture"):
        first, observer = next(calls), recipe.calibration_observer
        prepared = prepare(
            model, *first, recipe=recipe, runtime=runtime, selection=selection, observer=observer, trains=False
        )
    with timed(seconds, "calibrate"):
        calls = itertools.chain([first], calls)
        calibrate(prepared, (functools.partial(run_call, model, call, number) for number, call in enumerate(calls)))
    return prepared


def _quantize_layers(
    model: nn.Module,
    recipe: LayerRecipe,
    runtime: str,
    selection: Selection,
    calls: Iterator[Call],
    seconds: dict[str, float],
) -> PlannedModel:
    """Quantize on the first call; the others tell which sizes vary."""
    with timed(seconds, "quantize"):
        args, kwargs = next(calls)
        others = list(calls)
        quantized = quantize_layers(
            model, args, kwargs, recipe=recipe, runtime=runtime, selection=selection, calls=[(args, kwargs), *others]
        )
        for call in others:
            quantized.note_sizes(*call)
    return quantized
