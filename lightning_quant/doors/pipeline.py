"""The whole path without a Trainer: calibrate, convert, export, measure."""

import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightning_quant import runtimes
from lightning_quant.arguments.arguments import check_name, check_on_device
from lightning_quant.arguments.names import Engine, Recipes, Runtime
from lightning_quant.artifact import artifact as artifacts
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.artifact.labels import class_labels
from lightning_quant.calibrate.calibrate import calibrate
from lightning_quant.calls.calls import Call
from lightning_quant.calls.loaded import LoadedModule
from lightning_quant.capture.batch_readings import run_call
from lightning_quant.capture.calibration_data import CalibrationCalls
from lightning_quant.capture.checkpoint import load_module
from lightning_quant.doors.evaluated import evaluated, searched
from lightning_quant.doors.settings import Settings, documented
from lightning_quant.errors import CalibrationError, NoEffectWarning, QuantizationError
from lightning_quant.export.auto import choose_runtime
from lightning_quant.export.engines import AUTO
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection
from lightning_quant.machine.timed import timed
from lightning_quant.measure.output_noise import HeldOut, held_back
from lightning_quant.measure.sensitivity import NUM_CALLS, rank_operators
from lightning_quant.numerics.adjustments import outcomes
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.planned.sizes import ChosenShapes, notes_of_sizes
from lightning_quant.planned.way_inside import way_inside
from lightning_quant.recipe.recipe import AnyRecipe, LayerRecipe, Recipe
from lightning_quant.report.limits import Limits, check_measured
from lightning_quant.report.make_report import make_report, with_search
from lightning_quant.report.page import to_html
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.compilation import is_compiled
from lightning_quant.surgery.host import device_for_search, on_host
from lightning_quant.surgery.process import alone
from lightning_quant.surgery.routing import device_of


@documented(Settings)
def quantize(  # noqa: D417  `documented` adds the shared ones
    model_or_checkpoint: nn.Module | str | os.PathLike[str],
    recipe: Recipes | dict[str, Any] | AnyRecipe = "int8",
    runtime: Runtime = "onnxruntime",
    *,
    calibration_data: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    include: str | list[str] | tuple[str, ...] = ("*",),
    exclude: str | list[str] | tuple[str, ...] = (),
    dynamic_shapes: ChosenShapes = None,
    threads: int | None = None,
    sensitivity: bool = False,
    engine: Engine = "auto",
    lightning_module: nn.Module | type[nn.Module] | None = None,
    module: str | None = None,
    trust_checkpoint: bool = False,
    limits: Limits | dict[str, Any] | None = None,
    objective: str | None = None,
    max_validations: int | None = None,
    time_budget_s: float | None = None,
    evaluate: Callable[[nn.Module], Any] | None = None,
) -> Artifact:
    """Quantize a trained float module and write the artifact; the module itself stays as it is.

    Args:
        model_or_checkpoint: the float module, or the path of a Lightning checkpoint.
        calibration_data: a DataLoader or LightningDataModule, of whose batches the first 32 are cut to what the module
            takes, by name or by number, with a warning of what is left out; or any iterable of calls, each a tensor, a
            tuple of arguments or a dict of keyword arguments; or one tensor. Batches as in training; a few hundred
            samples are enough. Recipes of layers need one call, to try the layers on.
        lightning_module: of a checkpoint: its LightningModule's class, or an instance, which gets the weights.
        module: of a checkpoint: qualified name of the module to quantize, whose calls `calibration_data` holds; the
            LightningModule's own forward by default.
        trust_checkpoint: whether to load more of it than tensors and plain values, such as hyperparameters of any
            class, which runs code of whoever wrote the file.
        evaluate: function of a module, the float one or an exported file, to its metrics: a dict of numbers, or of the
            values of all samples, whose mean then counts and which intervals are made of; or one of these, called
            "metric". What limits on metrics are about.

    Raises:
        QuantizationError: an argument is wrong or a stage failed; nothing is half written.

    Warns:
        NoEffectWarning: for each warning in the report: failed parity, a failed recipe, a missed limit, a larger or
            slower file.
    """
    settings = Settings.of(locals())
    recipe, selection, limits = settings.recipe, settings.selection, settings.limits
    if evaluate is None:
        check_measured(
            limits,
            "`quantize` runs none: use its `evaluate`, or PostTrainingQuantization and its `quantize_checkpoint`",
        )
    if runtime != AUTO:
        runtimes.check_recipe(runtime, recipe)
    with alone(), way_inside(recipe, runtime):
        model = _float_module(model_or_checkpoint, lightning_module, module, trust=trust_checkpoint)
        if device_for_search(device_of(model)) != device_of(model):
            model = on_host(model)
        judged = evaluated(evaluate, model, settings)
        folder = artifacts.check_folder(output_dir if output_dir is not None else "quantized")
        given = CalibrationCalls(model, calibration_data)
        calls = iter(given)
        first = next(calls, None)
        if first is None:
            raise CalibrationError("Expected `calibration_data` to hold at least one call, but it is empty.")
        seconds: dict[str, float] = {}
        make = _calibrated if recipe.needs_calibration else _quantize_layers
        notes: tuple[str, ...] = ()
        calls = itertools.chain([first], calls)
        chosen: str = runtime
        if runtime == AUTO:
            data = list(calls)
            chosen, note = choose_runtime(
                lambda name: make(model, recipe, name, selection, iter(data), {}),  # type: ignore[arg-type]
                threads,
                dynamic_shapes,
            )
            notes, calls = (note,), iter(data)
        # A recipe with accuracy steps holds one of its calls back for itself.
        held: list[Call] = []
        calls = held_back(calls, recipe.needed_calls, held)
        few = list(itertools.islice(calls, NUM_CALLS)) if sensitivity else []
        calls = itertools.chain(few, calls)
        seen = list(calls) if settings.searches else []
        quantized: PlannedModel = make(model, recipe, chosen, selection, iter(seen) if seen else calls, seconds)  # type: ignore[arg-type]
        for call in held:
            quantized.note_sizes(*call)
        ranked = rank_operators(Prepared.of(quantized), few) if sensitivity else None
        search = None
        if settings.searches:
            quantized, search = searched(judged, quantized, seen, held, folder, seconds)
        quantized = quantized.on_host()
        artifact = export(
            quantized,
            folder,
            dynamic_shapes=dynamic_shapes,
            classes=class_labels(model),
            seconds=seconds,
            release=True,
            engine=engine,
        )
        notes += outcomes(quantized.accuracy_steps)
        notes += given.notes
        notes += notes_of_sizes(quantized)
        # Measured on a copy: another run may replace the artifact meanwhile.
        with artifacts.private_copy(artifact) as own:
            metrics, failed = judged.rows(quantized, own)
            report = make_report(
                quantized,
                own,
                metrics=metrics,
                seconds=seconds,
                threads=threads,
                notes=(*notes, *failed),
                sensitivity=ranked,
                held=HeldOut(tuple(held), "the last call, which took no part in calibration"),
                limits=limits,
            )
            report = with_search(report, search)
            artifact = artifacts.add_report(artifact, report.to_dict(), report.to_markdown(), to_page=to_html, own=own)
        for text in report.warnings:
            warnings.warn(f"{artifact.path}: {text}.", NoEffectWarning, stacklevel=2)
        return artifact


def _float_module(
    model_or_checkpoint: nn.Module | str | os.PathLike[str],
    lightning_module: nn.Module | type[nn.Module] | None,
    module: str | None,
    *,
    trust: bool,
) -> nn.Module:
    if isinstance(model_or_checkpoint, str | os.PathLike):
        check_name("module", module, "the LightningModule")
        model = load_module(model_or_checkpoint, lightning_module, module, trust=trust)
        check_on_device(model)
        return model
    if not isinstance(model_or_checkpoint, nn.Module):
        raise QuantizationError(_no_module(model_or_checkpoint))
    if isinstance(model_or_checkpoint, LoadedModule):
        raise QuantizationError("Expected a float module, but got a loaded artifact, which is quantized already.")
    if isinstance(model_or_checkpoint, torch.jit.ScriptModule) or _is_exported(model_or_checkpoint):
        raise QuantizationError(
            f"Expected a module with Python code of its own, but got a {type(model_or_checkpoint).__name__}: give the "
            "module that it was made from."
        )
    while is_compiled(model_or_checkpoint):
        model_or_checkpoint = model_or_checkpoint.get_submodule("_orig_mod")
    check_on_device(model_or_checkpoint)
    if lightning_module is not None or module is not None:
        raise QuantizationError(
            "Expected `lightning_module` and `module` with the path of a checkpoint only, but got them with a module: "
            "give the module to quantize itself."
        )
    return model_or_checkpoint


def _is_exported(module: nn.Module) -> bool:
    """Tell whether a module is what `torch.export` made, which has operators in place of layers."""
    graph = module.graph if isinstance(module, torch.fx.GraphModule) else None
    return graph is not None and any(isinstance(node.target, torch._ops.OpOverload) for node in graph.nodes)


def _no_module(given: Any) -> str:
    """Return what to say of something that is neither a module nor a path."""
    got, way_out = f"{given!r:.60}", ""
    if isinstance(given, type):
        got, way_out = f"the class {given.__name__}", f" Give an instance: `{given.__name__}(...)`."
    elif isinstance(given, Mapping):
        got, way_out = (
            "a dict",
            " Of a state dict: build the module, `module.load_state_dict(...)`, and give the module.",
        )
    elif callable(given) or isinstance(given, torch.export.ExportedProgram):
        got, way_out = f"{type(given).__name__}", " Give the module that it was made from."
    return f"Expected a float `nn.Module` or the path of a Lightning checkpoint, but got {got}.{way_out}"


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
