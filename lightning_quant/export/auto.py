"""`runtime="auto"`: try every installed runtime on this machine, and take the fastest that computes what it should.

Float on each of them is timed beside, so that the report says where integers gain nothing.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from lightning_quant import runtimes
from lightning_quant.artifact.artifact import load
from lightning_quant.calls.loaded import LoadedModule
from lightning_quant.errors import DiskError, QuantizationError
from lightning_quant.export.export import export
from lightning_quant.export.float_peers import FloatPeers
from lightning_quant.machine.disk import scratch_folder
from lightning_quant.machine.latency import Timing, measure
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.planned.sizes import ChosenShapes
from lightning_quant.surgery.process import torch_threads
from lightning_quant.surgery.routing import evaluation_mode

# Times the fastest beyond which a contestant is timed in a few rounds only, so that the others get many.
_HOPELESS = 4
# Operators in another runtime's file up to which runtimes that take long for each are tried.
_MOST_OPERATORS = 1000


class Choice(NamedTuple):
    """What was measured, and what came of it.

    Attributes:
        runtime: name of the fastest correct one, by the geometric mean of its times.
        note: all that was measured, in words.
        warnings: at which batches float is faster on some runtime than the artifact.
    """

    runtime: str
    note: str
    warnings: tuple[str, ...]


def choose_runtime(
    plan: Callable[[str], PlannedModel], threads: int | None = None, dynamic_shapes: ChosenShapes = None
) -> Choice:
    """Choose the fastest correct runtime, and time float on each of them beside it.

    Args:
        plan: gives the calibrated model, or the quantized layers, for a runtime.
        threads: of the measurement; one by default.
        dynamic_shapes: as for `export`.

    Raises:
        QuantizationError: no runtime gave a correct artifact; the message has every reason.
    """
    refused: dict[str, str] = {}
    with scratch_folder() as folder, FloatPeers() as peers, torch_threads(threads or 1):
        correct: dict[str, tuple[PlannedModel, nn.Module]] = {}
        floats: dict[str, nn.Module] = {}
        operators = 0
        for runtime in sorted(runtimes.names(), key=runtimes.unrolls):
            if correct and runtimes.unrolls(runtime) and (why := _too_long(correct, operators)):
                refused[runtime] = f"not tried: {why}; `runtime={runtime!r}` does"
                continue
            try:
                model = plan(runtime)
                artifact = export(model, folder / runtime, dynamic_shapes=dynamic_shapes)
                loaded = load(artifact.path, threads=threads or 1)
                failures = model.parity(loaded, artifact.model_path).failures
            except DiskError:
                raise
            except QuantizationError as error:
                refused[runtime] = str(error)
                continue
            if failures:
                refused[runtime] = f"parity FAILED: {failures[0]}"
                continue
            correct[runtime] = model, loaded
            operators = max(operators, sum(model.runtime.count_operators(artifact.model_path).values()))
            floats |= _float_peer(model, peers, threads or 1)
        if not correct:
            reasons = "; ".join(f"{runtime}: {reason}" for runtime, reason in refused.items())
            raise QuantizationError(f"Expected a runtime to give a correct artifact, but none did: {reasons}")
        floats["float in torch"] = model.root
        timings = _timed(correct, floats)
    fastest = min(correct, key=lambda runtime: math.prod(row[runtime].median_ms for row in timings.values()))
    return Choice(fastest, _in_words(fastest, timings, refused), _slower(fastest, list(correct), timings))


def _too_long(correct: dict[str, tuple[PlannedModel, nn.Module]], operators: int) -> str:
    """Say why runtimes that work on each operator, and on each step of recurrent layers, would take minutes."""
    model, _ = next(iter(correct.values()))
    if any(isinstance(module, nn.RNNBase) for module in model.root.modules()):
        return "it writes recurrent layers step by step, which takes minutes"
    if operators > _MOST_OPERATORS:
        return f"it takes minutes for {operators:,} operators"
    return ""


def _timed(
    correct: dict[str, tuple[PlannedModel, nn.Module]], floats: dict[str, nn.Module]
) -> dict[int, dict[str, Timing]]:
    """Time artifacts and float by the numbers of samples that a report shows: the fewest all take, and the captured."""
    models = [model for model, _ in correct.values()]
    contestants = {runtime: loaded for runtime, (_, loaded) in correct.items()} | floats
    timings = {}
    with evaluation_mode(floats["float in torch"]):
        for batch in dict.fromkeys((max(model.smallest for model in models), models[0].num_samples)):
            args, kwargs = models[0].call(models[0].samples(batch))
            calls = {name: functools.partial(called, *args, **kwargs) for name, called in contestants.items()}
            few = measure(calls, min_rounds=2, budget_s=0)
            bound = _HOPELESS * min(timing.median_ms for timing in few.values())
            timings[batch] = few | measure({name: call for name, call in calls.items() if few[name].median_ms <= bound})
    return timings


def _float_peer(model: PlannedModel, peers: FloatPeers, threads: int) -> dict[str, nn.Module]:
    """Return the float model in a runtime's own format, by name; nothing where it has none that soon."""
    if not model.runtime.COMPILES:
        with contextlib.suppress(QuantizationError):
            peer = peers.of(model, threads)
            if isinstance(peer, LoadedModule):
                args, kwargs = model.call(model.samples(model.smallest))
                peer(*args, **kwargs)
                return {f"float in {model.plan.runtime}": peer}
    return {}


def _slower(fastest: str, correct: list[str], timings: dict[int, dict[str, Timing]]) -> tuple[str, ...]:
    """Say at which numbers of samples float is faster than the chosen, and whether another artifact is not."""
    said = []
    for batch, row in timings.items():
        best = min((name for name in row if name not in correct), key=lambda name: row[name].median_ms)
        other = min(correct, key=lambda runtime: row[runtime].median_ms)
        times = round(row[fastest].median_ms / row[best].median_ms, 2)
        if times > 1:
            other_gains = row[other].median_ms < row[best].median_ms
            whose = f"the artifact on {fastest}, but not on {other}," if other_gains else "every artifact"
            said.append(f"{whose} is slower than {best} at batch {batch}: {fastest} takes {times:.2f} times the time")
    return tuple(said)


def _in_words(fastest: str, timings: dict[int, dict[str, Timing]], refused: dict[str, str]) -> str:
    measured = "; ".join(
        f"at batch {batch} {', '.join(f'{name} {timing} ms' for name, timing in row.items())}"
        for batch, row in timings.items()
    )
    over = " over the batches that a report shows" if len(timings) > 1 else ""
    text = f"{fastest} was chosen as the fastest{over}, in interleaved rounds: {measured}"
    if refused:
        reasons = "; ".join(f"{runtime} ({reason[:200]})" for runtime, reason in refused.items())
        text += f". Not considered: {reasons}"
    return text
