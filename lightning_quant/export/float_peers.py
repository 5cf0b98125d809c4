"""Float models in a runtime's own format, beside which artifacts are timed: written and loaded once for several."""

import contextlib
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from lightning_quant.artifact import artifact as artifacts
from lightning_quant.calls.signature import make_signature
from lightning_quant.export.model_file import export_float
from lightning_quant.machine.disk import scratch_folder
from lightning_quant.planned.planned_model import PlannedModel

# Seconds that each of several artifacts is timed for at each batch size, beside the same float models.
TIMING_S = 1.0


class FloatPeers:
    """Float models of one set of weights, by runtime; their files are there until it is left.

    Attributes:
        seconds: that the contestants of one artifact are timed for at each batch size.
    """

    def __init__(self, seconds: float = 3.0) -> None:
        self.seconds = seconds
        self._loaded: dict[tuple[str, int, str], nn.Module] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "FloatPeers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give models and files up."""
        self._loaded.clear()
        self._stack.close()

    def of(self, model: PlannedModel, threads: int) -> nn.Module | None:
        """Return the peer of a model; None where its runtime runs the float module itself.

        Raises:
            QuantizationError: the float model does not export.
        """
        if model.runtime.IN_PROCESS:
            return None
        key = (model.plan.runtime, threads, repr((model.spec.key(), model.exported)))
        if key not in self._loaded:
            self._loaded[key] = _load(model, self._stack.enter_context(scratch_folder()), threads)
        return self._loaded[key]


def _load(model: PlannedModel, folder: Path, threads: int) -> nn.Module:
    path = export_float(model, folder)
    args, kwargs = model.call()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        output = model.root(*args, **kwargs)
    signature = make_signature(replace(model.captured, dynamic=model.exported or {}), output)
    return model.runtime.load(folder, artifacts.model_files(path), signature, threads=threads)
