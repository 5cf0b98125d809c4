"""Stage 5: from a prepared model to an artifact, and the trial of it before training."""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant import artifact as artifacts
from lightning_quant import golden, runtimes
from lightning_quant.artifact import Artifact
from lightning_quant.convert import check_agreement, convert
from lightning_quant.engines import AUTO, choose_engine
from lightning_quant.errors import ExportError, QuantizationError
from lightning_quant.golden import GoldenBatch
from lightning_quant.layerwise import Layerwise
from lightning_quant.prepared import Prepared
from lightning_quant.progress import shown
from lightning_quant.ranges import Ranges
from lightning_quant.routing import clone, evaluation_mode, without_fast_path
from lightning_quant.signature import Signature, make_signature, tensor_leaves

DynamicShapes = dict[str, dict[int, str]]
Quantizable = Prepared | Layerwise
# Samples that the parity check looks at; every operator of the model is compared on them.
PARITY_SAMPLES = 16


def export(
    prepared: Quantizable,
    output_dir: Path,
    *,
    dynamic_shapes: DynamicShapes | None = None,
    classes: tuple[str, ...] | None = None,
    seconds: dict[str, float] | None = None,
    release: bool = False,
    engine: str = AUTO,
) -> Artifact:
    """Convert a trained or calibrated model, check it against its simulation, and write the artifact.

    Args:
        prepared: detached, every edge observed.
        output_dir: the artifact's folder; an artifact there is replaced.
        dynamic_shapes: input name to dimension to its name, beside the batch and what varied in the calls seen.
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
    runtime = runtimes.get(prepared.plan.runtime)
    started = time.perf_counter()
    dynamic = dynamic_dimensions(prepared, dynamic_shapes)
    converted, output = _converted(prepared, dynamic)
    seconds["convert"] = time.perf_counter() - started
    started = time.perf_counter()
    with shown("Exporting"), artifacts.staging(output_dir) as folder:
        staged = folder / runtime.MODEL_FILE
        dynamic = _write(prepared, converted, staged, dynamic)
        del converted
        _leave_out_unread(prepared, staged)
        if release and isinstance(prepared, Layerwise):
            prepared.release()
        signature = make_signature(prepared.signature, prepared.spec, prepared.tensors, output, dynamic)
        content = {
            "recipe": prepared.recipe.name,
            "runtime": prepared.plan.runtime,
            "signature": signature.to_dict(),
            "plan": prepared.plan.to_dict(),
            "outside": _outside(prepared),
            **({"classes": list(classes)} if classes and _are_scored(classes, signature) else {}),
            **_engine(prepared, staged, signature, engine),
        }
        golden.save(folder / golden.FILE, _golden_batch(prepared, staged, signature), content)
        written = artifacts.write(output_dir, staged, content)
    seconds["export"] = time.perf_counter() - started
    return written


def _engine(prepared: Quantizable, staged: Path, signature: Signature, engine: str) -> dict[str, Any]:
    """Return what the manifest says of the engine, where the runtime has several."""
    if isinstance(prepared, Layerwise):
        return {}
    choice = choose_engine(prepared, staged, signature, samples_of(prepared, PARITY_SAMPLES), engine)
    return {} if choice is None else {"engine": dataclasses.asdict(choice)}


def trial_export(prepared: Quantizable, *, dynamic_shapes: DynamicShapes | None = None) -> None:
    """Export with made-up ranges into a temporary folder and load the result: what fails here would fail later.

    Raises:
        ExportError: the module does not export; the message says why.
    """
    prepared = prepared.on_host()
    dynamic = dynamic_dimensions(prepared, dynamic_shapes)
    if isinstance(prepared, Layerwise):
        converted = prepared.quantized()
    else:
        trial = prepared.bound_to(prepared.root)
        trial.ranges = Ranges(prepared.ranges.edges, prepared.recipe, "min_max")
        for observer in trial.ranges.observers.values():
            observer.update(torch.tensor([0.0, 1.0]))
        converted = convert(trial, static_sizes=_only_batches(dynamic))
    with tempfile.TemporaryDirectory() as folder:
        _write(prepared, converted, Path(folder) / runtimes.get(prepared.plan.runtime).MODEL_FILE, dynamic)


def _converted(prepared: Quantizable, dynamic: DynamicShapes) -> tuple[nn.Module, Any]:
    """Return the module to export and its result for the captured call, on the CPU."""
    if isinstance(prepared, Layerwise):
        return prepared.quantized(), prepared.outputs[1]
    args, kwargs = prepared.call(prepared.tensors)
    converted = convert(prepared, static_sizes=_only_batches(dynamic))
    check_agreement(prepared, converted, args, kwargs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return converted, converted(*args, **kwargs)


def _write(prepared: Quantizable, converted: nn.Module, staged: Path, dynamic: DynamicShapes) -> DynamicShapes:
    """Write and check the model file; return the dimensions that may vary in it."""
    runtime = runtimes.get(prepared.plan.runtime)
    attempts = [dynamic]
    if isinstance(prepared, Layerwise) and (with_sequences := _with_sequences(prepared, dynamic)) != dynamic:
        attempts = [with_sequences, dynamic]
    for attempt in attempts:
        try:
            runtime.export(converted, prepared.signature, prepared.spec, prepared.tensors, staged, dynamic=attempt)
            runtime.check(staged)
        except ExportError:
            if attempt is attempts[-1]:
                raise
        else:
            return attempt
    return dynamic


def _leave_out_unread(prepared: Quantizable, staged: Path) -> None:
    """Take out of the plan what the exporter found that nothing reads."""
    runtime = runtimes.get(prepared.plan.runtime)
    if isinstance(prepared, Prepared) and hasattr(runtime, "quantized_edges"):
        prepared.plan = prepared.plan.with_edges(runtime.quantized_edges(staged))


def _with_sequences(prepared: Layerwise, dynamic: DynamicShapes) -> DynamicShapes:
    """Let the second dimension of integer inputs vary, too: they are token ids and masks of sequences.

    Inputs of one length share its name, but for those of a decoder.
    """
    names: dict[tuple[int, bool], str] = {}
    result = {name: dict(dimensions) for name, dimensions in dynamic.items()}
    for name, tensor in zip(prepared.spec.names, prepared.tensors, strict=True):
        if tensor.dim() == 2 and not tensor.is_floating_point() and 1 not in result.get(name, {}):
            key = (tensor.shape[1], name.startswith("decoder"))
            label = names.setdefault(key, "sequence" if not names else f"sequence_{len(names)}")
            result.setdefault(name, {})[1] = label
    return result


def samples_of(prepared: Quantizable, number: int) -> list[Tensor]:
    """Return the captured tensors with at most that many samples along every batch dimension."""
    dynamic = dynamic_dimensions(prepared)
    named = zip(prepared.spec.names, prepared.tensors, strict=True)
    return [t[:number] if dynamic.get(name, {}).get(0) == "batch" else t for name, t in named]


def _golden_batch(prepared: Quantizable, staged: Path, signature: Signature) -> GoldenBatch:
    captured = prepared.tensors[0].shape[0] if prepared.tensors and prepared.tensors[0].dim() else 1
    inputs = samples_of(prepared, golden.num_samples(prepared.tensors, captured))
    floating = _float_outputs(prepared, inputs)
    if sum(t.numel() * t.element_size() for t in floating) > golden.MAX_OUTPUT_BYTES:
        # Scores for a vocabulary at each place of a sequence: a few places tell as much.
        inputs = [_shortened(t, info.shape) for t, info in zip(inputs, signature.inputs, strict=True)]
        floating = _float_outputs(prepared, inputs)
    loaded = runtimes.get(prepared.plan.runtime).load(staged.parent, artifacts.model_files(staged), signature)
    with torch.no_grad():
        exported = loaded.run(inputs)
    return GoldenBatch(tuple(inputs), tuple(floating), tuple(exported))


def _float_outputs(prepared: Quantizable, inputs: list[Tensor]) -> list[Tensor]:
    args, kwargs = prepared.call(inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluation_mode(prepared.root), without_fast_path():
        return tensor_leaves(prepared.root(*args, **kwargs))


def _shortened(tensor: Tensor, shape: tuple[int | str, ...]) -> Tensor:
    for axis, size in enumerate(shape):
        if isinstance(size, str):
            tensor = tensor.narrow(axis, 0, min(golden.SHORT if axis else 1, tensor.shape[axis]))
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
    return (
        f"The artifact is {what} alone. What the data pipeline and the training step do before calling it (resizing, "
        "scaling, normalization, tokenization) and with its result (softmax, argmax, decoding) stays outside. "
        f"In the captured call {', '.join(ranges) or 'there were no numbers'}."
    )


def export_float(prepared: Quantizable, folder: Path) -> Path:
    """Write the float model in the runtime's own format, as the peer of latency comparisons."""
    runtime = runtimes.get(prepared.plan.runtime)
    root = clone(prepared.root).eval()
    path = folder / f"float_{runtime.MODEL_FILE}"
    runtime.export(
        root, prepared.signature, prepared.spec, prepared.tensors, path, dynamic=dynamic_dimensions(prepared)
    )
    return path


def dynamic_dimensions(prepared: Quantizable, chosen: DynamicShapes | None = None) -> DynamicShapes:
    """Return input name to dimension to its name for all dimensions that may vary.

    These are the batch (the first dimension of every input that has the first input's size there), what differed
    between calls, and what the user chose. Where inputs varied in the same dimension and had the same size in it, the
    two share a name.

    Raises:
        QuantizationError: a chosen input or dimension does not exist.
    """
    sizes = {name: tuple(tensor.shape) for name, tensor in zip(prepared.spec.names, prepared.tensors, strict=True)}
    batch = next((size[0] for size in sizes.values() if size), None)
    result: DynamicShapes = {name: {0: "batch"} for name, size in sizes.items() if size and size[0] == batch}
    for name, dimension in sorted(prepared.varying):
        result.setdefault(name, {}).setdefault(dimension, f"dim{dimension}_{sizes[name][dimension]}")
    for name, dimensions in (chosen or {}).items():
        for dimension, label in dimensions.items():
            if name not in sizes or not 0 <= int(dimension) < len(sizes[name]):
                raise QuantizationError(
                    f"Expected `dynamic_shapes` to name inputs out of {sizes}, but got {name!r}: {dimension}."
                )
            result.setdefault(name, {})[int(dimension)] = label
    return result


def _only_batches(dynamic: DynamicShapes) -> bool:
    return all(label == "batch" for dimensions in dynamic.values() for label in dimensions.values())
