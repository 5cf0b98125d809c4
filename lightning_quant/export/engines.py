"""Which engine's kernels an artifact runs on, for runtimes that have several: tried here, one that is correct."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lightning_quant import runtimes
from lightning_quant.arguments.choice import check_choice
from lightning_quant.arguments.names import EngineName
from lightning_quant.artifact.artifact import model_files
from lightning_quant.calls.signature import Signature
from lightning_quant.errors import QuantizationError
from lightning_quant.machine.latency import Timing, measure
from lightning_quant.planned.planned_model import Compared, PlannedModel
from lightning_quant.simulate.parity import MINIMUM_SHARE, PARITY_SAMPLES

AUTO: Literal["auto"] = "auto"
FASTEST: Literal["fastest"] = "fastest"


@dataclass(frozen=True)
class EngineChoice:
    """The engine that an artifact runs on unless `load` is given another.

    Attributes:
        name: of the engine.
        measured: in words, why it is this one, and what was measured of it and of the others.
    """

    name: str
    measured: str


def check_engine(runtime: str, engine: str) -> None:
    """Make sure that a runtime has an engine; every one has "auto" and "fastest".

    Raises:
        QuantizationError: it has not.
    """
    check_choice("engine", engine, get_args(EngineName))
    if engine in (AUTO, FASTEST):
        return
    known = [] if runtime == AUTO else runtimes.get(runtime).engines()
    if not known:
        several = runtimes.that(lambda other: other.engines())
        raise QuantizationError(
            f"Expected no `engine` for `runtime` {runtime!r}, but got {engine!r}: runtime {several} alone has several."
        )
    if engine not in known:
        raise QuantizationError(
            f"Expected `engine` to be one of {known}, which this build of PyTorch has kernels of, but got {engine!r}."
        )


def choose_engine(model: PlannedModel, staged: Path, signature: Signature, engine: str = AUTO) -> EngineChoice | None:
    """Try engines on a written model, and let it run on one whose parity holds.

    By default that is the first in the runtime's own order, so that equal input gives an equal file; a timing would
    not. Where no engine's parity holds, the report warns, and one whose operators are each right is taken, or the
    closest.

    Args:
        model: what was exported.
        staged: the model file, not published yet.
        signature: of the model.
        engine: "fastest" to time those whose parity holds and take the fastest; or a name, to take that one whatever
            it computes: the report then says what is wrong with it.

    Returns:
        None where a runtime has but one, or stores layers alone.
    """
    runtime = model.runtime
    if not (runtime.engines() and any(graph.operators for graph in model.plan.graphs)):
        return None
    tensors = model.samples(PARITY_SAMPLES)
    checks: dict[str, Compared] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name in runtime.engines() if engine in (AUTO, FASTEST) else [engine]:
        runtime.set_engine(staged, name)
        loaded = runtime.load(staged.parent, model_files(staged), signature, threads=torch.get_num_threads())
        checks[name] = model.parity(loaded, staged)
        calls[name] = functools.partial(loaded.run, tensors)
        if engine == AUTO and not checks[name].failures:
            break
    tiers = [[n for n in calls if not checks[n].failures], [n for n in calls if _operators_hold(checks[n])]]
    trusted = next((tier for tier in tiers if tier), [max(calls, key=lambda n: _rank(checks[n]))])
    timings = measure({name: calls[name] for name in trusted}) if engine == FASTEST else {}
    chosen = min(trusted, key=lambda n: timings[n].median_ms) if timings else trusted[0]
    runtime.set_engine(staged, chosen)
    return EngineChoice(chosen, _in_words(chosen, timings, checks, engine))


def _operators_hold(parity: Compared) -> bool:
    """Tell whether each operator alone is right: in deep networks rounding ties add up all the same."""
    return parity.worst_share is not None and parity.worst_share >= MINIMUM_SHARE


def _rank(parity: Compared) -> tuple[float, float]:
    return parity.worst_share or 0.0, parity.artifact_db


def _in_words(chosen: str, timings: dict[str, Timing], checks: dict[str, Compared], engine: str) -> str:
    which = "fastest" if engine == FASTEST else "first in order"
    if engine not in (AUTO, FASTEST):
        why = "was asked for"
    elif not checks[chosen].failures:
        why = f"is the {which} of the correct ones"
    elif _operators_hold(checks[chosen]):
        why = f"is the {which} whose operators are right, each alone, though parity does not hold from end to end"
    else:
        why = "comes closest to its simulation"
    text = f"engine {chosen} {why}"
    if timings:
        measured = ", ".join(f"{name} {timing} ms" for name, timing in timings.items())
        text += f", measured on the captured batch in interleaved rounds: {measured}"
    wrong = "; ".join(f"{name} ({parity.failures[0]})" for name, parity in checks.items() if parity.failures)
    return f"{text}. Not correct here: {wrong}" if wrong else text
