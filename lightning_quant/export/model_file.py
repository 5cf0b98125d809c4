"""A model file in which as much may vary as works: written, loaded and called, one try after the other."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.artifact import artifact as artifacts
from lightning_quant.calls.calls import DynamicShapes
from lightning_quant.calls.loaded import LoadedModule
from lightning_quant.calls.signature import Signature, leaves_of, make_signature, tensor_leaves
from lightning_quant.capture.capture import isolated_rng
from lightning_quant.errors import DiskError, ExportError, QuantizationError
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.planned.decisions import decided_as_captured, decisions, in_words
from lightning_quant.planned.inside import load_inside
from lightning_quant.planned.kept_sizes import sizes_forgotten
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.planned.sizes import dynamic_dimensions
from lightning_quant.runtimes import Runtime
from lightning_quant.simulate.parity import PARITY_SAMPLES
from lightning_quant.surgery.routing import as_exported, clone, evaluation_mode, without_fast_path

# Decibels by which a runtime may be farther from what was exported than that is from float: it tips ties of rounding.
_DOUBT_DB = 10.0
# Decibels that a file of the captured sizes must gain for sizes that vary to be given up.
_GAIN_DB = 6.0


@dataclass(frozen=True)
class Written:
    """A model file that was written, loaded and called."""

    dynamic: DynamicShapes
    signature: Signature
    loaded: LoadedModule
    agreement_db: float


def write_model(
    model: PlannedModel, converted: nn.Module, output: Any, staged: Path, wanted: list[DynamicShapes]
) -> Written:
    """Write a model file in which as much may vary as works, and load and call it.

    Raises:
        ExportError: it does not work with the least of it, either.
    """
    if model.into_only:
        return _write_tensors(model, converted, output, staged)
    doubted: Written | None = None
    for dynamic in wanted:
        if doubted is not None and dynamic is not wanted[-1]:
            continue
        try:
            written = _attempt(model, converted, output, staged, dynamic)
        except DiskError:
            raise
        except QuantizationError as error:
            if dynamic is wanted[-1] and doubted is None:
                # What is left in the last attempt is what the user asked to vary in the file.
                if dynamic or not model.may_give_up_program:
                    raise
                model.decided = ()
                model.give_up_program(str(error))
                return _write_tensors(model, converted, output, staged)
            model.refused += ((dynamic, str(error)),)
            continue
        if doubted is not None and written.agreement_db >= doubted.agreement_db + _GAIN_DB:
            why = (
                f"with them free, what {model.plan.runtime} computes is {doubted.agreement_db:.1f} dB from what was "
                f"exported, with these {written.agreement_db:.1f} dB"
            )
            model.refused += ((doubted.dynamic, why),)
            return written
        if doubted is None and (dynamic is wanted[-1] or _is_faithful(model, converted, written)):
            return written
        doubted = doubted or written
    if doubted is None:
        raise ExportError("Expected a way to export, but there is none.")
    return _attempt(model, converted, output, staged, doubted.dynamic)


def _write_tensors(model: PlannedModel, converted: nn.Module, output: Any, staged: Path) -> Written:
    """Write layers and tensors without a program, and load them into a copy of the module."""
    model.runtime.export_tensors(converted, staged)
    model.exported = dynamic_dimensions(model)
    signature = make_signature(replace(model.captured, dynamic=model.exported), output)
    loaded = load_inside(model, staged.parent, artifacts.model_files(staged), signature)
    return Written(model.exported, signature, loaded, math.inf)


def _attempt(model: PlannedModel, converted: nn.Module, output: Any, staged: Path, dynamic: DynamicShapes) -> Written:
    """Write, check, load and call a model file with these dimensions free.

    Raises:
        QuantizationError: a step failed.
    """
    runtime = model.runtime
    _export_module(model, converted, staged, dynamic)
    runtime.check(staged)
    model.exported = dynamic
    places = model.batch.outputs if model.batch is not None and model.varies_in_file else ()
    signature = make_signature(replace(model.captured, dynamic=dynamic), output, places)
    loaded = runtime.load(staged.parent, artifacts.model_files(staged), signature)
    optional = tuple(name for name in model.spec.names if name in loaded.unread)
    decided = in_words(model.decided)
    loaded.signature = signature = replace(signature, optional=optional, decisions=decided)
    return Written(dynamic, signature, loaded, min(_agreements(model, converted, loaded)))


def _agreements(model: PlannedModel, converted: nn.Module, loaded: LoadedModule) -> list[float]:
    """Call a file with the fewest samples and with more; return how near to what was exported the answers are.

    OpenVINO has been seen to answer calls of up to four rows with 13 dB, and others with 45. What decides by its input
    may decide otherwise on fewer samples, and is compared on the captured ones alone.
    """
    agreements = []
    for number in (1, PARITY_SAMPLES):
        inputs = model.samples(number)
        with torch.no_grad():
            answers = loaded.run(inputs)
        if number > 1 or not (model.decided or model.num_samples == model.smallest):
            agreements.append(signal_to_noise(_exported_outputs(model, converted, inputs), answers))
    return agreements


def _export_module(model: PlannedModel, converted: nn.Module, staged: Path, dynamic: DynamicShapes) -> None:
    """Write a model file; one that decides as the captured call does where an exporter has no values to look at.

    Raises:
        ExportError: the runtime's exporter refuses the module.
    """
    runtime = model.runtime
    call = replace(model.captured, dynamic=dynamic)
    with sizes_forgotten(converted, model) if dynamic else nullcontext():
        model.decided = ()
        try:
            runtime.export(converted, call, staged)
        except ExportError:
            decided = decisions(converted, *model.call())
            if not decided:
                raise
            with decided_as_captured(converted, decided):
                runtime.export(converted, call, staged)
            model.decided = decided


def _is_faithful(model: PlannedModel, converted: nn.Module, written: Written) -> bool:
    """Tell whether a runtime is about as near to what was exported as that is to float."""
    inputs = model.samples(PARITY_SAMPLES)
    exported = _exported_outputs(model, converted, inputs)
    return written.agreement_db >= signal_to_noise(float_outputs(model, inputs), exported) - _DOUBT_DB


def _exported_outputs(model: PlannedModel, converted: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    args, kwargs = model.call(inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), as_exported():
        return tensor_leaves(converted(*args, **kwargs))


def float_outputs(model: PlannedModel, inputs: list[Tensor]) -> list[Tensor]:
    """Return what the float module answers to the captured call with these tensors."""
    args, kwargs = model.call(inputs)
    with torch.no_grad(), isolated_rng(0), evaluation_mode(model.root), without_fast_path():
        return leaves_of(model.root(*args, **kwargs))


def export_float(model: PlannedModel, folder: Path, runtime: Runtime) -> Path:
    """Write the float model in a runtime's own format, as the peer of latency comparisons."""
    root = clone(model.root).eval()
    path = folder / f"float_{runtime.MODEL_FILE}"
    with decided_as_captured(root, model.decided):
        runtime.export(root, replace(model.captured, dynamic=model.exported or {}), path)
    return path
