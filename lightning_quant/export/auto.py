"""`runtime="auto"`: try every installed runtime on this machine, and take the fastest that computes what it should.

Float on each of them is timed beside, so that the report says where integers gain nothing.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lightning_quant import runtimes
from lightning_quant.artifact import golden
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


class Choice(NamedTuple):
    """What was measured, and what came of it.

    Attributes:
        runtime: name of the fastest correct one.
        note: all that was measured, in words.
        warnings: that float is faster on some runtime than every artifact, if it is.
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
        candidates: dict[str, Callable[[], Any]] = {}
        floats: dict[str, Callable[[], Any]] = {}
        for runtime in runtimes.names():
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
            inputs = list(golden.load(artifact.golden_path, artifact.signature).inputs)
            candidates[runtime] = functools.partial(loaded.run, inputs)
            floats |= _float_peer(model, peers, threads or 1, inputs)
            root, call = model.root, model.call(inputs)
        if not candidates:
            reasons = "; ".join(f"{runtime}: {reason}" for runtime, reason in refused.items())
            raise QuantizationError(f"Expected a runtime to give a correct artifact, but none did: {reasons}")
        floats["float in torch"] = functools.partial(root, *call.args, **call.kwargs)
        with evaluation_mode(root):
            timings = measure({**candidates, **floats})
    fastest = min(candidates, key=lambda runtime: timings[runtime].median_ms)
    best = min(floats, key=lambda name: timings[name].median_ms)
    return Choice(fastest, _in_words(fastest, timings, refused), _slower(fastest, best, timings))


def _float_peer(
    model: PlannedModel, peers: FloatPeers, threads: int, inputs: list[Tensor]
) -> dict[str, Callable[[], Any]]:
    """Return a call of the float model in a runtime's own format, by name; nothing where it has none that soon."""
    if not model.runtime.COMPILES:
        with contextlib.suppress(QuantizationError):
            peer = peers.of(model, threads)
            if isinstance(peer, LoadedModule):
                peer.run(inputs)
                return {f"float in {model.plan.runtime}": functools.partial(peer.run, inputs)}
    return {}


def _slower(fastest: str, best: str, timings: dict[str, Timing]) -> tuple[str, ...]:
    times = timings[fastest].median_ms / timings[best].median_ms
    if times <= 1:
        return ()
    return (f"every artifact is slower than {best}, the fastest on {fastest} {times:.2f} times the time",)


def _in_words(fastest: str, timings: dict[str, Timing], refused: dict[str, str]) -> str:
    measured = ", ".join(f"{name} {timing} ms" for name, timing in timings.items())
    text = f"{fastest} was chosen as the fastest on the golden batch, in interleaved rounds: {measured}"
    if refused:
        reasons = "; ".join(f"{runtime} ({reason[:200]})" for runtime, reason in refused.items())
        text += f". Not considered: {reasons}"
    return text
