"""Float models in a runtime's own format, beside which artifacts are timed: written and loaded once for several."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from lightning_quant import runtimes
from lightning_quant.artifact import artifact as artifacts
from lightning_quant.calls.signature import make_signature
from lightning_quant.errors import MissingRuntimeError
from lightning_quant.export.model_file import export_float
from lightning_quant.machine.disk import scratch_folder
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.runtimes import Runtime

# Seconds that each of several artifacts is timed for at each batch size, beside the same float models.
TIMING_S = 1.0
# Seconds of a float model's export beyond which none is made for other runtimes.
_PATIENCE_S = 10.0


class FloatPeers:
    """Float models of one set of weights, by runtime; their files are there until it is left.

    Attributes:
        seconds: that the contestants of one artifact are timed for at each batch size.
    """

    def __init__(self, seconds: float = 3.0) -> None:
        self.seconds = seconds
        self._loaded: dict[tuple[str, int, str], nn.Module] = {}
        self._made_in: dict[str, float] = {}
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

    def of(self, model: PlannedModel, threads: int, runtime: Runtime | None = None) -> nn.Module | None:
        """Return the peer of a model, in its own runtime or another; None where that runs the float module itself.

        Raises:
            QuantizationError: the float model does not export.
        """
        runtime = runtime or model.runtime
        if runtime.IN_PROCESS:
            return None
        key = (runtime.NAME, threads, repr((model.spec.key(), model.exported)))
        if key not in self._loaded:
            started = time.perf_counter()
            self._loaded[key] = _load(model, self._stack.enter_context(scratch_folder()), threads, runtime)
            self._made_in[runtime.NAME] = time.perf_counter() - started
        return self._loaded[key]

    def elsewhere(self, model: PlannedModel, threads: int) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
        """Return peers in the other runtimes that are installed and written soon, by name, and why others are missing.

        There are none where the own peer took long, or there is none.
        """
        own = model.plan.runtime
        seconds = self._made_in.get(own)
        if seconds is None:
            return {}, ()
        if seconds > _PATIENCE_S:
            return {}, (f"float was timed in {own} and torch alone, as its export took {seconds:.0f} s",)
        peers, missing = dict[str, nn.Module](), list[str]()
        for name in runtimes.names():
            try:
                peer = self.of(model, threads, runtime) if (runtime := _other(name, own)) is not None else None
                if peer is not None:
                    args, kwargs = model.call(model.samples(model.smallest))
                    peer(*args, **kwargs)
                    peers[name] = peer
            # Whatever its libraries raise: the peer is there for one more figure.
            except Exception as error:
                missing.append(f"float was not timed in {name}: {str(error) or repr(error)}".rstrip("."))
        return peers, tuple(missing)


def _other(name: str, own: str) -> Runtime | None:
    """Return a runtime whose float is timed beside artifacts of another; None where it is not."""
    try:
        runtime = runtimes.get(name)
    except MissingRuntimeError:
        return None
    return runtime if runtime.QUICK_FLOAT and name != own else None


def _load(model: PlannedModel, folder: Path, threads: int, runtime: Runtime) -> nn.Module:
    path = export_float(model, folder, runtime)
    args, kwargs = model.call()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        output = model.root(*args, **kwargs)
    signature = make_signature(replace(model.captured, dynamic=model.exported or {}), output)
    return runtime.load_float(folder, artifacts.model_files(path), signature, threads)
