"""Stage 5: from a prepared model to an artifact, and the trial of it before training."""

import math
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant import __version__, golden
from lightning_quant import artifact as artifacts
from lightning_quant.artifact import Artifact
from lightning_quant.capture import isolated_rng
from lightning_quant.captured import BATCH, DynamicShapes
from lightning_quant.convert import check_agreement, convert
from lightning_quant.decisions import decided_as_captured, decisions, in_words
from lightning_quant.engines import AUTO, choose_engine
from lightning_quant.errors import ArtifactError, CalibrationError, ExportError, QuantizationError
from lightning_quant.golden import GoldenBatch
from lightning_quant.inside import load_inside
from lightning_quant.kept_sizes import sizes_forgotten
from lightning_quant.layerwise import Layerwise
from lightning_quant.loaded import LoadedModule
from lightning_quant.noise import signal_to_noise
from lightning_quant.parity import check_parity
from lightning_quant.prepared import Prepared
from lightning_quant.progress import shown
from lightning_quant.ranges import Ranges
from lightning_quant.routing import as_exported, clone, evaluation_mode, without_fast_path
from lightning_quant.runtimes import Runtime
from lightning_quant.signature import Signature, leaves_of, make_signature, tensor_leaves
from lightning_quant.sizes import ChosenShapes, attempts, chosen_shapes, dynamic_dimensions, only_batches

Quantizable = Prepared | Layerwise
# Samples that the parity check looks at; every operator of the model is compared on them.
PARITY_SAMPLES = 16
# Decibels by which a runtime may be farther from what was exported than that is from float: it tips ties of rounding.
_DOUBT_DB = 10.0
# Decibels that a file of the captured sizes must gain for sizes that vary to be given up.
_GAIN_DB = 6.0


@dataclass(frozen=True)
class _Written:
    """A model file that was written, loaded and called."""

    dynamic: DynamicShapes
    signature: Signature
    loaded: LoadedModule
    agreement_db: float


def export(
    prepared: Quantizable,
    output_dir: Path,
    *,
    dynamic_shapes: ChosenShapes = None,
    classes: tuple[str, ...] | None = None,
    seconds: dict[str, float] | None = None,
    release: bool = False,
    engine: str = AUTO,
) -> Artifact:
    """Convert a trained or calibrated model, check it against its simulation, and write the artifact.

    Args:
        prepared: detached, every edge observed.
        output_dir: the artifact's folder; an artifact there is replaced.
        dynamic_shapes: input name to dimension to its name, beside the batch and what varied in the calls seen;
            "static" keeps the captured sizes.
        classes: labels of the classes, where they are known; left out when no output has a score for each.
        seconds: gets the time of the stages under "convert" and "export".
        release: give up quantized layers once they are written, so that they are not held beside the loaded artifact.
        engine: of runtimes that have several; "auto" tries them on the captured call.

    Raises:
        CalibrationError: an edge was never observed.
        ExportError: the converted model disagrees with the simulation, or does not export.
    """
    seconds = {} if seconds is None else seconds
    prepared = prepared.on_host()
    runtime = prepared.runtime
    started = time.perf_counter()
    chosen = chosen_shapes(dynamic_shapes)
    converted, output = _converted(prepared, dynamic_dimensions(prepared, chosen))
    seconds["convert"] = time.perf_counter() - started
    started = time.perf_counter()
    with shown("Exporting"), artifacts.staging(output_dir) as folder:
        staged = folder / runtime.MODEL_FILE
        written = _write(prepared, converted, output, staged, attempts(prepared, chosen))
        del converted
        _leave_out_unread(prepared, staged)
        if release and isinstance(prepared, Layerwise):
            prepared.release()
        result = _publish(prepared, written, staged, output_dir, classes, engine)
    seconds["export"] = time.perf_counter() - started
    return result


def _publish(
    prepared: Quantizable,
    written: _Written,
    staged: Path,
    output_dir: Path,
    classes: tuple[str, ...] | None = None,
    engine: str = AUTO,
) -> Artifact:
    """Make an artifact of a model file that is written."""
    signature = written.signature
    content = {
        "recipe": prepared.recipe.name,
        "runtime": prepared.plan.runtime,
        "signature": signature.to_dict(),
        "plan": prepared.plan.to_dict(),
        **({"into_only": prepared.into_only} if prepared.into_only else {}),
        "outside": _outside(prepared),
        **({"classes": list(classes)} if classes and _are_scored(classes, signature) else {}),
        **_engine(prepared, staged, signature, engine),
    }
    _describe(prepared.runtime, staged, content)
    golden.save(staged.parent / golden.FILE, _golden_batch(prepared, written), content)
    return artifacts.write(output_dir, staged, content)


def _describe(runtime: Runtime, staged: Path, content: dict[str, Any]) -> None:
    """Write into a model file what a user of the file alone would ask, where its format has room for that."""
    facts: dict[str, Any] = {name: content[name] for name in ("recipe", "classes") if name in content}
    facts["version"] = __version__
    runtime.describe(staged, facts)


def _engine(prepared: Quantizable, staged: Path, signature: Signature, engine: str) -> dict[str, Any]:
    """Return what the manifest says of the engine, where the runtime has several."""
    if isinstance(prepared, Layerwise):
        return {}
    choice = choose_engine(prepared, staged, signature, samples_of(prepared, PARITY_SAMPLES), engine)
    return {} if choice is None else {"engine": asdict(choice)}


def trial_export(prepared: Quantizable, *, dynamic_shapes: ChosenShapes = None) -> None:
    """Do once, in a temporary folder, what the end will do: what fails here would fail later.

    Ranges are those of the captured call alone. What was found out of the sizes stays with the model.

    Raises:
        ExportError: the module does not export; the message says why.
    """
    trial = prepared.on_host()
    chosen = chosen_shapes(dynamic_shapes)
    if isinstance(trial, Prepared):
        trial = _calibrated_once(trial)
    converted, output = _converted(trial, dynamic_dimensions(trial, chosen))
    with tempfile.TemporaryDirectory() as folder, artifacts.staging(Path(folder).resolve()) as place:
        staged = place / trial.runtime.MODEL_FILE
        written = _write(trial, converted, output, staged, attempts(trial, chosen))
        _leave_out_unread(trial, staged)
        _rehearse(trial, written, staged)
        artifacts.standalone(_publish(trial, written, staged, place.parent))
    trial.share_sizes(prepared)


def _rehearse(prepared: Quantizable, written: _Written, staged: Path) -> None:
    """Do what follows a model file that is written: latency's calls, parity, counting of operators."""
    runtime = prepared.runtime
    for number in (1, prepared.num_samples):
        args, kwargs = prepared.call(prepared.samples(number))
        with torch.no_grad():
            written.loaded(*args, **kwargs)
    if isinstance(prepared, Prepared) and not runtime.engines():
        # Where there are engines, their choice looks at it.
        check_parity(prepared, written.loaded, runtime, staged, prepared.samples(PARITY_SAMPLES))
    operators = tuple(operator for graph in prepared.plan.graphs for operator in graph.operators)
    runtime.still_float(operators, runtime.count_operators(staged))


def _calibrated_once(prepared: Prepared) -> Prepared:
    """Return another binding with ranges of the captured call, or made-up ones where that call gives no numbers."""
    trial = prepared.bound_to(prepared.root)
    trial.ranges = Ranges(prepared.ranges.edges, prepared.recipe, "min_max")
    args, kwargs = trial.call()
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluation_mode(trial.root), suppress(CalibrationError):
        with trial.attached("observe", observing=True):
            trial.root(*args, **kwargs)
        trial.ranges.check()
        return trial
    trial.ranges = Ranges(prepared.ranges.edges, prepared.recipe, "min_max")
    for observer in trial.ranges.observers.values():
        observer.update(torch.tensor([0.0, 1.0]))
    return trial


def _converted(prepared: Quantizable, dynamic: DynamicShapes) -> tuple[nn.Module, Any]:
    """Return the module to export and its result for the captured call, on the CPU."""
    if isinstance(prepared, Layerwise):
        return prepared.quantized(), prepared.outputs[1]
    args, kwargs = prepared.call()
    converted = convert(prepared, static_sizes=only_batches(dynamic))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), as_exported():
        check_agreement(prepared, converted, args, kwargs)
        return converted, converted(*args, **kwargs)


def _write(
    prepared: Quantizable, converted: nn.Module, output: Any, staged: Path, wanted: list[DynamicShapes]
) -> _Written:
    """Write a model file in which as much may vary as works, and load and call it.

    Raises:
        ExportError: it does not work with the least of it, either.
    """
    if prepared.into_only:
        return _write_tensors(prepared, converted, output, staged)
    doubted: _Written | None = None
    for dynamic in wanted:
        if doubted is not None and dynamic is not wanted[-1]:
            continue
        try:
            written = _attempt(prepared, converted, output, staged, dynamic)
        except (ExportError, ArtifactError, QuantizationError) as error:
            if dynamic is wanted[-1] and doubted is None:
                # What is left in the last attempt is what the user asked to vary in the file.
                if not isinstance(prepared, Layerwise) or dynamic:
                    raise
                prepared.decided = ()
                try:
                    prepared.give_up_program(str(error))
                except ExportError:
                    raise error from None
                return _write_tensors(prepared, converted, output, staged)
            prepared.refused += ((dynamic, str(error)),)
            continue
        if doubted is not None and written.agreement_db >= doubted.agreement_db + _GAIN_DB:
            why = (
                f"with them free, what {prepared.plan.runtime} computes is {doubted.agreement_db:.1f} dB from what was "
                f"exported, with these {written.agreement_db:.1f} dB"
            )
            prepared.refused += ((doubted.dynamic, why),)
            return written
        if doubted is None and (dynamic is wanted[-1] or _is_faithful(prepared, converted, written)):
            return written
        doubted = doubted or written
    if doubted is None:
        raise ExportError("Expected a way to export, but there is none.")
    return _attempt(prepared, converted, output, staged, doubted.dynamic)


def _write_tensors(prepared: Quantizable, converted: nn.Module, output: Any, staged: Path) -> _Written:
    """Write layers and tensors without a program, and load them into a copy of the module."""
    prepared.runtime.export_tensors(converted, staged)
    prepared.exported = dynamic_dimensions(prepared)
    signature = make_signature(replace(prepared.captured, dynamic=prepared.exported), output)
    loaded = load_inside(prepared, staged.parent, artifacts.model_files(staged), signature)
    return _Written(prepared.exported, signature, loaded, math.inf)


def _leave_out_unread(prepared: Quantizable, staged: Path) -> None:
    """Take out of the plan what the exporter found that nothing reads."""
    if isinstance(prepared, Prepared) and prepared.runtime.KEEPS_EDGES:
        prepared.plan = prepared.plan.with_edges(prepared.runtime.quantized_edges(staged))


def _attempt(
    prepared: Quantizable, converted: nn.Module, output: Any, staged: Path, dynamic: DynamicShapes
) -> _Written:
    """Write, check, load and call a model file with these dimensions free.

    Raises:
        QuantizationError: a step failed.
    """
    runtime = prepared.runtime
    _export_module(prepared, converted, staged, dynamic)
    runtime.check(staged)
    prepared.exported = dynamic
    places = prepared.batch.outputs if prepared.batch is not None and prepared.varies_in_file else ()
    signature = make_signature(replace(prepared.captured, dynamic=dynamic), output, places)
    loaded = runtime.load(staged.parent, artifacts.model_files(staged), signature)
    optional = tuple(name for name in prepared.spec.names if name in loaded.unread)
    decided = in_words(prepared.decided)
    loaded.signature = signature = replace(signature, optional=optional, decisions=decided)
    for number in (1, PARITY_SAMPLES):
        inputs = prepared.samples(number)
        with torch.no_grad():
            answers = loaded.run(inputs)
    expected = _exported_outputs(prepared, converted, inputs)
    return _Written(dynamic, signature, loaded, signal_to_noise(expected, answers))


def _export_module(prepared: Quantizable, converted: nn.Module, staged: Path, dynamic: DynamicShapes) -> None:
    """Write a model file; one that decides as the captured call does where an exporter has no values to look at.

    Raises:
        ExportError: the runtime's exporter refuses the module.
    """
    runtime = prepared.runtime
    call = replace(prepared.captured, dynamic=dynamic)
    with sizes_forgotten(converted, prepared) if dynamic else nullcontext():
        prepared.decided = ()
        try:
            runtime.export(converted, call, staged)
        except ExportError:
            decided = decisions(converted, *prepared.call())
            if not decided:
                raise
            with decided_as_captured(converted, decided):
                runtime.export(converted, call, staged)
            prepared.decided = decided


def _is_faithful(prepared: Quantizable, converted: nn.Module, written: _Written) -> bool:
    """Tell whether a runtime is about as near to what was exported as that is to float."""
    inputs = prepared.samples(PARITY_SAMPLES)
    exported = _exported_outputs(prepared, converted, inputs)
    return written.agreement_db >= signal_to_noise(_float_outputs(prepared, inputs), exported) - _DOUBT_DB


def _exported_outputs(prepared: Quantizable, converted: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    args, kwargs = prepared.call(inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), as_exported():
        return tensor_leaves(converted(*args, **kwargs))


def samples_of(prepared: Quantizable, number: int) -> list[Tensor]:
    """Return the captured tensors with at most that many samples, where there are samples to tell apart."""
    return prepared.samples(number)


def _golden_batch(prepared: Quantizable, written: _Written) -> GoldenBatch:
    inputs = prepared.samples(golden.num_samples(prepared.tensors, prepared.num_samples))
    floating = _float_outputs(prepared, inputs)
    if sum(t.numel() * t.element_size() for t in floating) > golden.MAX_OUTPUT_BYTES:
        # Scores for a vocabulary at each place of a sequence: a few places tell as much.
        inputs = [_shortened(t, info.shape) for t, info in zip(inputs, written.signature.inputs, strict=True)]
        floating = _float_outputs(prepared, inputs)
    with torch.no_grad():
        exported = written.loaded.run(inputs)
    return GoldenBatch(tuple(inputs), tuple(floating), tuple(exported))


def _float_outputs(prepared: Quantizable, inputs: list[Tensor]) -> list[Tensor]:
    args, kwargs = prepared.call(inputs)
    with torch.no_grad(), isolated_rng(0), evaluation_mode(prepared.root), without_fast_path():
        return leaves_of(prepared.root(*args, **kwargs))


def _shortened(tensor: Tensor, shape: tuple[int | str, ...]) -> Tensor:
    for axis, size in enumerate(shape):
        if isinstance(size, str):
            tensor = tensor.narrow(axis, 0, min(1 if size == BATCH else golden.SHORT, tensor.shape[axis]))
    return tensor


def _are_scored(classes: tuple[str, ...], signature: Signature) -> bool:
    return any(len(info.shape) > 1 and info.shape[-1] == len(classes) for info in signature.outputs)


def _outside(prepared: Quantizable) -> str:
    """Return in words what of the user's program is not part of the artifact."""
    named = zip(prepared.spec.names, prepared.tensors, strict=True)
    ranges = [
        f"`{name}` lay in [{t.min().item():.4g}, {t.max().item():.4g}]"
        for name, t in named
        if t.numel() and (t.is_floating_point() or t.dtype in (torch.int32, torch.int64, torch.uint8))
    ]
    what = f"`{prepared.plan.module}`" if prepared.plan.module else f"the forward of {type(prepared.root).__name__}"
    if isinstance(prepared, Layerwise) and prepared.parts:
        what = " and ".join(f"`{name}`" for name in prepared.parts)
    return (
        f"The artifact is {what} alone. What the data pipeline and the training step do before calling it (resizing, "
        "scaling, normalization, tokenization) and with its result (softmax, argmax, decoding) stays outside. "
        f"In the captured call {', '.join(ranges) or 'there were no numbers'}."
    )


def export_float(prepared: Quantizable, folder: Path) -> Path:
    """Write the float model in the runtime's own format, as the peer of latency comparisons."""
    runtime = prepared.runtime
    root = clone(prepared.root).eval()
    path = folder / f"float_{runtime.MODEL_FILE}"
    with decided_as_captured(root, prepared.decided):
        runtime.export(root, replace(prepared.captured, dynamic=prepared.exported or {}), path)
    return path
