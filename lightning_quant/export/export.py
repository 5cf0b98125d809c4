"""From a planned model to an artifact, and the trial of it before training."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant import __version__
from lightning_quant.artifact import artifact as artifacts
from lightning_quant.artifact import golden
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.artifact.golden import GoldenBatch
from lightning_quant.calls.signature import Signature
from lightning_quant.export.engines import AUTO, FASTEST, choose_engine
from lightning_quant.export.lost_edges import lost_edges
from lightning_quant.export.model_file import Written, float_outputs, write_model
from lightning_quant.machine.disk import scratch_folder
from lightning_quant.machine.timed import timed
from lightning_quant.planned.planned_model import BATCH, PlannedModel
from lightning_quant.planned.sizes import ChosenShapes, attempts, chosen_shapes, dynamic_dimensions, only_batches
from lightning_quant.runtimes import Runtime
from lightning_quant.terminal.progress import shown


def export(
    model: PlannedModel,
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
        model: detached, every edge observed.
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
    model = model.on_host()
    runtime = model.runtime
    chosen = chosen_shapes(dynamic_shapes)
    with timed(seconds, "convert"):
        converted, output = model.converted(static_sizes=only_batches(dynamic_dimensions(model, chosen)))
    with timed(seconds, "export"), shown("Exporting"), artifacts.staging(output_dir) as folder:
        staged = folder / runtime.MODEL_FILE
        written = write_model(model, converted, output, staged, attempts(model, chosen))
        _keep_to_file(model, converted, staged)
        del converted
        if release:
            model.release()
        return _publish(model, written, staged, output_dir, classes, engine)


def _publish(
    model: PlannedModel,
    written: Written,
    staged: Path,
    output_dir: Path,
    classes: tuple[str, ...] | None = None,
    engine: str = AUTO,
) -> Artifact:
    """Make an artifact of a model file that is written."""
    signature = written.signature
    choice = choose_engine(model, staged, signature, engine)
    content = {
        "recipe": model.recipe.name,
        "runtime": model.plan.runtime,
        "signature": signature.to_dict(),
        "plan": model.plan.to_dict(),
        **({"into_only": model.into_only} if model.into_only else {}),
        "outside": _outside(model),
        **({"classes": list(classes)} if classes and _are_scored(classes, signature) else {}),
        **({} if choice is None else {"engine": asdict(choice)}),
    }
    _describe(model.runtime, staged, content)
    golden.save(staged.parent / golden.FILE, _golden_batch(model, written), content)
    return artifacts.write(output_dir, staged, content)


def _describe(runtime: Runtime, staged: Path, content: dict[str, Any]) -> None:
    """Write into a model file what a user of the file alone would ask, where its format has room for that."""
    facts: dict[str, Any] = {name: content[name] for name in ("recipe", "classes") if name in content}
    facts["version"] = __version__
    runtime.describe(staged, facts)


def trial_export(model: PlannedModel, *, dynamic_shapes: ChosenShapes = None, engine: str = AUTO) -> int:
    """Do once, in a temporary folder, what the end will do: what fails here would fail later.

    Ranges are those of the captured call alone. What was found out of the sizes stays with the model. Returns the bytes
    of the model files.

    Raises:
        ExportError: the module does not export; the message says why.
    """
    trial = model.on_host().for_trial()
    chosen = chosen_shapes(dynamic_shapes)
    converted, output = trial.converted(static_sizes=only_batches(dynamic_dimensions(trial, chosen)))
    with scratch_folder() as folder:
        place = folder / "staged"
        place.mkdir()
        staged = place / trial.runtime.MODEL_FILE
        written = write_model(trial, converted, output, staged, attempts(trial, chosen))
        _keep_to_file(trial, converted, staged)
        _rehearse(trial, written, staged)
        # Which engine is fastest is measured at the end; that one is correct can be known now.
        tried = AUTO if engine == FASTEST else engine
        artifact = _publish(trial, written, staged, folder, engine=tried)
        artifacts.standalone(artifact)
        size = artifact.size_bytes
    trial.share_sizes(model)
    return size


def _rehearse(model: PlannedModel, written: Written, staged: Path) -> None:
    """Do what follows a model file that is written: latency's calls, parity, counting of operators."""
    runtime = model.runtime
    for number in (1, model.num_samples):
        args, kwargs = model.call(model.samples(number))
        with torch.no_grad():
            written.loaded(*args, **kwargs)
    if not runtime.engines():
        # Where there are engines, their choice looks at it.
        model.parity(written.loaded, staged)
    operators = tuple(operator for graph in model.plan.graphs for operator in graph.operators)
    runtime.still_float(operators, runtime.count_operators(staged))


def _keep_to_file(model: PlannedModel, converted: nn.Module, staged: Path) -> None:
    """Take out of the plan what a file has not: what nothing reads, and what was lost on the way, if anything was."""
    if model.plan.graphs and model.runtime.KEEPS_EDGES:
        present = model.runtime.quantized_edges(staged)
        model.plan = model.plan.with_edges(present, lost_edges(model, converted, present))


def _golden_batch(model: PlannedModel, written: Written) -> GoldenBatch:
    inputs = model.samples(golden.num_samples(model.tensors, model.num_samples))
    floating = float_outputs(model, inputs)
    if sum(t.numel() * t.element_size() for t in floating) > golden.MAX_OUTPUT_BYTES:
        # Scores for a vocabulary at each place of a sequence: a few places tell as much.
        inputs = [_shortened(t, info.shape) for t, info in zip(inputs, written.signature.inputs, strict=True)]
        floating = float_outputs(model, inputs)
    with torch.no_grad():
        exported = written.loaded.run(inputs)
    return GoldenBatch(tuple(inputs), tuple(floating), tuple(exported))


def _shortened(tensor: Tensor, shape: tuple[int | str, ...]) -> Tensor:
    for axis, size in enumerate(shape):
        if isinstance(size, str):
            tensor = tensor.narrow(axis, 0, min(1 if size == BATCH else golden.SHORT, tensor.shape[axis]))
    return tensor


def _are_scored(classes: tuple[str, ...], signature: Signature) -> bool:
    return any(len(info.shape) > 1 and info.shape[-1] == len(classes) for info in signature.outputs)


def _outside(model: PlannedModel) -> str:
    """Return in words what of the user's program is not part of the artifact."""
    named = zip(model.spec.names, model.tensors, strict=True)
    ranges = [
        f"`{name}` lay in [{t.min().item():.4g}, {t.max().item():.4g}]"
        for name, t in named
        if t.numel() and (t.is_floating_point() or t.dtype in (torch.int32, torch.int64, torch.uint8))
    ]
    what = f"`{model.plan.module}`" if model.plan.module else f"the forward of {type(model.root).__name__}"
    if model.parts:
        what = " and ".join(f"`{name}`" for name in model.parts)
    return (
        f"The artifact is {what} alone. What the data pipeline and the training step do before calling it (resizing, "
        "scaling, normalization, tokenization) and with its result (softmax, argmax, decoding) stays outside. "
        f"In the captured call {', '.join(ranges) or 'there were no numbers'}."
    )
