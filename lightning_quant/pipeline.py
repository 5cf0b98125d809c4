"""The whole path without a Trainer: calibrate, convert, export, measure."""

import itertools
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lightning_quant import artifact as artifacts
from lightning_quant import recipe as recipes
from lightning_quant.accuracy.sensitivity import NUM_CALLS, check_rankable, rank_operators
from lightning_quant.artifact import Artifact
from lightning_quant.assess import assess
from lightning_quant.auto import choose_runtime
from lightning_quant.calibrate import as_call, calibrate, steps_of
from lightning_quant.checkpoint import load_module
from lightning_quant.engines import AUTO, check_engine
from lightning_quant.errors import CalibrationError, QuantizationError
from lightning_quant.export import DynamicShapes, Quantizable, export, in_float32
from lightning_quant.graph.table import Selection
from lightning_quant.labels import class_labels
from lightning_quant.layerwise import quantize_layers
from lightning_quant.prepare import prepare
from lightning_quant.prepared import Prepared
from lightning_quant.recipe import AnyRecipe, LayerRecipe, Recipe


def quantize(
    model_or_checkpoint: nn.Module | str | os.PathLike[str],
    recipe: str | dict[str, Any] | AnyRecipe = "int8",
    runtime: str = "onnxruntime",
    *,
    calibration_data: Iterable[Any] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    include: tuple[str, ...] | list[str] = ("*",),
    exclude: tuple[str, ...] | list[str] = (),
    dynamic_shapes: DynamicShapes | None = None,
    threads: int | None = None,
    sensitivity: bool = False,
    engine: str = AUTO,
    lightning_module: nn.Module | type[nn.Module] | None = None,
    module: str | None = None,
) -> Artifact:
    """Quantize a trained float module and write the artifact; the module itself stays as it is.

    Args:
        model_or_checkpoint: the float module, or the path of a Lightning checkpoint.
        recipe: numerics, by name or object.
        runtime: where the artifact will run; "auto" makes one for every installed runtime and keeps the fastest whose
            parity holds, with what was measured in the report.
        calibration_data: calls, each a tensor, a tuple of arguments or a dict of keyword arguments. Batches as in
            training; a few hundred samples are enough.
        output_dir: the artifact's folder; "quantized" in the working directory by default. An artifact there
            is replaced.
        include: fnmatch patterns on qualified names and layer types of what may be quantized.
        exclude: likewise, of what stays float.
        dynamic_shapes: input name to dimension to its name, for dimensions beside the batch that may vary.
        threads: for the latencies in the report; torch's number of threads by default.
        sensitivity: whether the report says which operator costs what; it runs the model four to six times for each
            operator, on the first two calls. For recipes that need calibration.
        engine: whose kernels run a static recipe on runtime "torch"; "auto" measures those of this build and takes the
            fastest whose parity holds, with what was measured in the report.
        lightning_module: of a checkpoint: its LightningModule's class, or an instance, which gets the weights.
        module: of a checkpoint: qualified name of the module to quantize, whose calls `calibration_data` holds; the
            LightningModule's own forward by default.

    Raises:
        QuantizationError: an argument is wrong or a stage failed; nothing is half written.
    """
    model = _float_module(model_or_checkpoint, lightning_module, module)
    if calibration_data is None:
        raise QuantizationError("Expected `calibration_data` to hold at least one call, but got None.")
    folder = Path(output_dir if output_dir is not None else "quantized")
    artifacts.check_folder(folder)
    calls = iter(calibration_data)
    first = next(calls, None)
    if first is None:
        raise CalibrationError("Expected `calibration_data` to hold at least one call, but it is empty.")
    recipe = recipes.get(recipe)
    check_rankable(recipe, sensitivity=sensitivity)
    check_engine(runtime, engine)
    selection = Selection(tuple(include), tuple(exclude))
    seconds: dict[str, float] = {}
    make = _quantize_layers if isinstance(recipe, LayerRecipe) else _calibrated
    notes: tuple[str, ...] = ()
    calls = itertools.chain([first], calls)
    if runtime == AUTO:
        data = list(calls)
        runtime, note = choose_runtime(
            lambda name: make(model, recipe, name, selection, iter(data), {}),  # type: ignore[arg-type]
            threads,
            dynamic_shapes,
        )
        notes, calls = (note,), iter(data)
    few = list(itertools.islice(calls, NUM_CALLS)) if sensitivity else []
    quantized: Quantizable = make(model, recipe, runtime, selection, itertools.chain(few, calls), seconds)  # type: ignore[arg-type]
    found = None
    if sensitivity and isinstance(quantized, Prepared):
        found = rank_operators(quantized, [as_call(call) for call in few])
    artifact = export(
        quantized,
        folder,
        dynamic_shapes=dynamic_shapes,
        classes=class_labels(model),
        seconds=seconds,
        release=True,
        engine=engine,
    )
    if isinstance(quantized, Prepared):
        notes += tuple(str(step) for step in quantized.accuracy_steps)
    report = assess(quantized, artifact, seconds=seconds, threads=threads, notes=notes, sensitivity=found)
    return artifacts.add_report(artifact, report.to_dict(), report.to_markdown())


def _float_module(
    model_or_checkpoint: nn.Module | str | os.PathLike[str],
    lightning_module: nn.Module | type[nn.Module] | None,
    module: str | None,
) -> nn.Module:
    if not isinstance(model_or_checkpoint, nn.Module):
        return load_module(model_or_checkpoint, lightning_module, module)
    if lightning_module is not None or module is not None:
        raise QuantizationError(
            "Expected `lightning_module` and `module` with the path of a checkpoint only, but got them with a module: "
            "give the module to quantize itself."
        )
    return model_or_checkpoint


def _calibrated(
    model: nn.Module,
    recipe: Recipe,
    runtime: str,
    selection: Selection,
    calls: Iterator[Any],
    seconds: dict[str, float],
) -> Prepared:
    started = time.perf_counter()
    first, observer = next(calls), recipe.calibration_observer
    prepared = prepare(model, *as_call(first), recipe=recipe, runtime=runtime, selection=selection, observer=observer)
    seconds["capture"] = time.perf_counter() - started
    started = time.perf_counter()
    calibrate(prepared, steps_of(prepared, itertools.chain([first], calls)))
    seconds["calibrate"] = time.perf_counter() - started
    return in_float32(prepared)  # type: ignore[return-value]


def _quantize_layers(
    model: nn.Module,
    recipe: LayerRecipe,
    runtime: str,
    selection: Selection,
    calls: Iterator[Any],
    seconds: dict[str, float],
) -> Quantizable:
    """Quantize on the first call; the others tell which sizes vary."""
    started = time.perf_counter()
    args, kwargs = as_call(next(calls))
    others = [as_call(call) for call in calls]
    quantized = quantize_layers(
        model, args, kwargs, recipe=recipe, runtime=runtime, selection=selection, calls=[(args, kwargs), *others]
    )
    for call in others:
        quantized.note_sizes(*call)
    seconds["quantize"] = time.perf_counter() - started
    return in_float32(quantized)
