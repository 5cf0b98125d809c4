"""`runtime="auto"`: try every installed runtime on this machine, and take the fastest that computes what it should."""

import functools
from collections.abc import Callable
from typing import Any

from lightning_quant import runtimes
from lightning_quant.artifact import golden
from lightning_quant.artifact.artifact import load
from lightning_quant.errors import DiskError, QuantizationError
from lightning_quant.export.export import export
from lightning_quant.machine.disk import scratch_folder
from lightning_quant.machine.latency import Timing, measure
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.planned.sizes import ChosenShapes


def choose_runtime(
    plan: Callable[[str], PlannedModel], threads: int | None = None, dynamic_shapes: ChosenShapes = None
) -> tuple[str, str]:
    """Return the name of the fastest correct runtime, and what was measured in words.

    Args:
        plan: gives the calibrated model, or the quantized layers, for a runtime.
        threads: of the measurement; one by default.
        dynamic_shapes: as for `export`.

    Raises:
        QuantizationError: no runtime gave a correct artifact; the message has every reason.
    """
    refused: dict[str, str] = {}
    with scratch_folder() as folder:
        candidates: dict[str, Callable[[], Any]] = {}
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
            batch = golden.load(artifact.golden_path, artifact.signature)
            candidates[runtime] = functools.partial(loaded.run, list(batch.inputs))
        if not candidates:
            reasons = "; ".join(f"{runtime}: {reason}" for runtime, reason in refused.items())
            raise QuantizationError(f"Expected a runtime to give a correct artifact, but none did: {reasons}")
        timings = measure(candidates)
    fastest = min(timings, key=lambda runtime: timings[runtime].median_ms)
    return fastest, _in_words(fastest, timings, refused)


def _in_words(fastest: str, timings: dict[str, Timing], refused: dict[str, str]) -> str:
    measured = ", ".join(f"{runtime} {timing} ms" for runtime, timing in timings.items())
    text = f"{fastest} was chosen as the fastest on the golden batch, in interleaved rounds: {measured}"
    if refused:
        reasons = "; ".join(f"{runtime} ({reason[:200]})" for runtime, reason in refused.items())
        text += f". Not considered: {reasons}"
    return text
