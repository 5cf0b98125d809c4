"""Runs of which every weight and every edge is carried out on its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lightning_quant.simulate import running


@contextmanager
def one_by_one() -> Iterator[None]:
    """Carry out runs as `Simulation` does: every weight and every edge on its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "rounds_plainly", lambda prepared, graph: False)
        yield
