"""Which engine's kernels an artifact runs on, for runtimes that have several: tried here, the fastest correct one."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_quant import runtimes
from lightning_quant.artifact import model_files
from lightning_quant.errors import QuantizationError
from lightning_quant.latency import Timing, measure
from lightning_quant.parity import MINIMUM_SHARE, Parity, check_parity
from lightning_quant.prepared import Prepared
from lightning_quant.signature import Signature

AUTO = "auto"


@dataclass(frozen=True)
class EngineChoice:
    """The engine that an artifact runs on unless `load` is told otherwise.

    Attributes:
        name: of the engine.
        measured: in words, what was measured of it and of the others.
    """

    name: str
    measured: str


def check_engine(runtime: str, engine: str) -> None:
    """Make sure that a runtime has an engine; every one has "auto".

    Raises:
        QuantizationError: it has not.
    """
    if engine == AUTO:
        return
    known = runtimes.get(runtime).engines() if runtime in runtimes.names() and _has_engines(runtime) else []
    if engine not in known:
        raise QuantizationError(
            f"Expected `engine` to be {AUTO!r} or an engine of `runtime` {runtime!r}, {known or 'which has none'}, but "
            f"got {engine!r}."
        )


def choose_engine(
    prepared: Prepared, staged: Path, signature: Signature, tensors: list[Tensor], engine: str = AUTO
) -> EngineChoice | None:
    """Try engines on a written model, and let it run on the fastest whose parity holds.

    Where none's does, the report warns, and the fastest whose operators are each right is taken, or the least wrong.

    Args:
        prepared: what was exported.
        staged: the model file, not published yet.
        signature: of the model.
        tensors: of the captured call, as many samples as are to be tried.
        engine: a name, to take that one whatever it computes: the report then says what is wrong with it.

    Returns:
        None where a runtime has but one.
    """
    if not _has_engines(prepared.plan.runtime):
        return None
    runtime = runtimes.get(prepared.plan.runtime)
    checks: dict[str, Parity] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name in runtime.engines() if engine == AUTO else [engine]:
        runtime.set_engine(staged, name)
        loaded = runtime.load(staged.parent, model_files(staged), signature, threads=torch.get_num_threads())
        checks[name] = check_parity(prepared, loaded, runtime, staged, tensors)
        calls[name] = functools.partial(loaded.run, tensors)
    tiers = [[n for n in calls if not checks[n].failures], [n for n in calls if _operators_hold(checks[n])]]
    trusted = next((tier for tier in tiers if tier), [max(calls, key=lambda n: _rank(checks[n]))])
    timings = measure({name: calls[name] for name in trusted})
    chosen = min(trusted, key=lambda n: timings[n].median_ms)
    runtime.set_engine(staged, chosen)
    return EngineChoice(chosen, _in_words(chosen, timings, checks, engine))


def _has_engines(runtime: str) -> bool:
    return hasattr(runtimes.get(runtime), "set_engine")


def _operators_hold(parity: Parity) -> bool:
    """Tell whether each operator alone is right: in deep networks rounding ties add up all the same."""
    return parity.worst_share is not None and parity.worst_share >= MINIMUM_SHARE


def _rank(parity: Parity) -> tuple[float, float]:
    return parity.worst_share or 0.0, parity.artifact_db


def _in_words(chosen: str, timings: dict[str, Timing], checks: dict[str, Parity], engine: str) -> str:
    why = "was asked for"
    if engine == AUTO:
        why = "is the least wrong one"
        if _operators_hold(checks[chosen]):
            why = "is the fastest whose operators are right, each alone, though parity does not hold from end to end"
        if not checks[chosen].failures:
            why = "is the fastest correct one"
    measured = ", ".join(f"{name} {timing} ms" for name, timing in timings.items())
    wrong = "; ".join(f"{name} ({parity.failures[0]})" for name, parity in checks.items() if parity.failures)
    text = f"engine {chosen} {why}, measured on the captured batch in interleaved rounds: {measured}"
    return f"{text}. Not correct here: {wrong}" if wrong else text
