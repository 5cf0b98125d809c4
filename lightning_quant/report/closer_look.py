"""What only the report's page shows: numbers of operators, their time, and samples that got another prediction."""

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_quant.calls.calls import Call, flatten_call
from lightning_quant.errors import NoEffectWarning, QuantizationError
from lightning_quant.measure.changed_predictions import Predictions, changed_predictions
from lightning_quant.measure.operator_numbers import OperatorNumbers, operator_numbers
from lightning_quant.measure.output_noise import HeldOut
from lightning_quant.planned.parts import in_parts
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.report.changed import Changed
from lightning_quant.report.numbers import Numbers
from lightning_quant.runtimes import Runtime
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.host import moved_call
from lightning_quant.surgery.routing import evaluation_mode, without_fast_path

# Samples whose numbers are looked at, and multiply-adds of their calls, a second or two, beyond which nothing is.
_SAMPLES = 4
_MULTIPLY_ADDS = 10**10


class CloserLook(NamedTuple):
    """What was seen."""

    numbers: Numbers
    changed: Changed


def closer_look(
    model: PlannedModel,
    compared: tuple[nn.Module, Any],
    path: Path,
    threads: int,
    *,
    held: HeldOut | None,
    predictions: Predictions | None = None,
) -> CloserLook:
    """Look at operators and predictions on a few samples that chose no range, where there are such.

    Args:
        model: the trained or calibrated model, detached and on the CPU.
        compared: the float module and the artifact, called in the same way.
        path: of the model file.
        threads: of a call.
        held: calls that chose nothing.
        predictions: noted while validation ran; where it did not, those of the held calls are.
    """
    numbers: tuple[OperatorNumbers, ...] = ()
    try:
        numbers = _numbers(model, held)
        worst = tuple(dict.fromkeys(one.name for one in sorted(numbers, key=lambda one: one.own_db)))
        base = "validation"
        if predictions is not None and not predictions.num_samples and held is not None:
            _note(predictions, *compared, held)
            base = held.base
        changed = None
        if predictions is not None:
            called = compared[1] if model.into_only else in_parts(compared[1], model)
            changed = changed_predictions(model, called, predictions, base, worst=worst)
        return CloserLook(Numbers(numbers, _operator_ms(model, path, threads)), Changed(changed))
    # What was trained and measured is not lost for the sake of a figure.
    except Exception as error:
        warnings.warn(f"The report lacks a closer look: {error!r}. Please report this.", NoEffectWarning, stacklevel=2)
        return CloserLook(Numbers(numbers, {}), Changed(None))


def _numbers(model: PlannedModel, held: HeldOut | None) -> tuple[OperatorNumbers, ...]:
    if not isinstance(model, Prepared) or not model.operators:
        return ()
    each = sum(row.macs for row in model.plan.rows) // max(1, model.num_samples)
    number = min(_SAMPLES, _MULTIPLY_ADDS // max(1, each))
    if number < 1:
        return ()
    call = _few(model, held.calls[0], number) if held is not None and held.calls else None
    return operator_numbers(model, model.call(model.samples(number)) if call is None else call)


def _few(model: PlannedModel, call: Call, number: int) -> Call | None:
    """Return a call of the captured structure with so many samples at most; None where it is of another."""
    try:
        spec, tensors = flatten_call(model.signature, *moved_call(*call))
    except QuantizationError:
        return None
    if spec.key() != model.spec.key() or model.batch is None:
        return None
    return model.call(model.batch.cut(spec.names, tensors, 0, max(number, model.batch.smallest)))


def _note(predictions: Predictions, root: nn.Module, artifact: Callable[..., Any], held: HeldOut) -> None:
    # Calls that are none of the artifact tell nothing; the comparison of outputs says so.
    with contextlib.suppress(QuantizationError):
        for call in held.calls:
            call = moved_call(*call)
            with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluation_mode(root), without_fast_path():
                predictions.note_float(call, root(*call.args, **call.kwargs))
                predictions.note_artifact(call, artifact(*call.args, **call.kwargs))


def _operator_ms(model: PlannedModel, path: Path, threads: int) -> dict[str, float]:
    operators = tuple(operator for graph in model.plan.graphs for operator in graph.operators)
    if not operators or model.into_only:
        return {}
    inputs = dict(zip(model.spec.names, model.samples(model.smallest), strict=True))
    runtime: Runtime = model.runtime
    return runtime.operator_ms(path, inputs, operators, threads)
