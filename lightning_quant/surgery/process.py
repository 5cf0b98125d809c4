"""Settings that PyTorch has once for a whole process: lent while a block runs, and given back by the last of all.

Several threads may be inside at once. Each that saved what another had set, and put that back, would leave a setting of
ours behind; so the first to come remembers the process's own, and the last to go restores it.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch

_LOCK = threading.RLock()
_PATCHED = threading.RLock()
# Setting to how many blocks hold it, and what it was before the first.
_HELD: dict[str, tuple[int, Any]] = {}


@contextmanager
def alone() -> Iterator[None]:
    """Let one thread at a time trace and export: PyTorch patches the process for that, its modules and its output."""
    with _PATCHED:
        yield


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Run PyTorch on that many threads; on those that it has when None."""
    if number is None or number == torch.get_num_threads():
        yield
        return
    before = _enter("threads", torch.get_num_threads())
    torch.set_num_threads(number)
    try:
        yield
    finally:
        with _LOCK:
            _leave("threads")
            # How many there are is remembered for each thread as well, so all of them put it back.
            torch.set_num_threads(before)


@contextmanager
def quantized_engine(name: str) -> Iterator[None]:
    """Let PyTorch pack weights for the kernels of one engine, one thread at a time.

    Packed weights run on their engine whatever is set then.
    """
    with _LOCK:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = name
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


@contextmanager
def resizable_results() -> Iterator[None]:
    """Let quantized kernels run that resize, although the process asks for deterministic algorithms.

    PyTorch refuses linear layers of x86 and fbgemm then, and padding that reflects, as a result might not be filled;
    these fill all of it.
    """
    if not torch.are_deterministic_algorithms_enabled() and "deterministic" not in _HELD:
        yield
        return
    with _LOCK:
        asked = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        _enter("deterministic", asked)
        torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        with _LOCK:
            before = _leave("deterministic")
            if before is not None:
                torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _enter(setting: str, value: Any) -> Any:
    """Count one more holder; return what the setting was before the first."""
    with _LOCK:
        holders, before = _HELD.get(setting, (0, value))
        _HELD[setting] = holders + 1, before
        return before


def _leave(setting: str) -> Any:
    """Count one holder less; return what the setting was before the first when this was the last, else None."""
    holders, before = _HELD.pop(setting)
    if holders > 1:
        _HELD[setting] = holders - 1, before
        return None
    return before


@contextmanager
def graphs_unprinted() -> Iterator[None]:
    """Keep graphs of `torch.fx` from printing the errors that they raise, where these are handled."""
    with alone(), redirect_stderr(io.StringIO()):
        yield
