"""How long the stages of a run take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Put the wall-clock seconds of a block under the name of its stage; a block that raises leaves none."""
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
