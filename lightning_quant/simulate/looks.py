"""What looks at a simulation while a block runs, or changes how it computes there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_quant.numerics.bias_correction import InputMeans
from lightning_quant.numerics.folding import Folded
from lightning_quant.simulate.quantizers import Quantizers


class Looks:
    """Base of the simulation.

    Attributes:
        input_means: when set, gets the means of what weighted operators read while observing.
        beside: other quantizers of the same graphs that observe what the simulation's own do, and means of theirs.
        only: when set, the weighted operators and edges that are rounded; all others compute in float.
        watcher: when set, gets every edge's identity and float values while nothing is rounded.
        recorded: when a list, every tensor that is rounded is appended to it as `(edge, integers)`.
        hidden: when set, `(batch, time)`, true at places that do not count for ranges.
        jitter: when set, draws by how much of itself a value is moved before it is rounded.
        kept: when a dict, weights do not change, and what was computed of them stays in it, by operator: folded, in
            integers, and the bias, where sums may begin with it.
    """

    def __init__(self) -> None:
        self.input_means: InputMeans | None = None
        self.beside: Sequence[tuple[Quantizers, InputMeans | None]] = ()
        self.only: frozenset[str] | None = None
        self.watcher: Callable[[str, Tensor], None] | None = None
        self.recorded: list[tuple[str, Tensor]] | None = None
        self.hidden: Tensor | None = None
        self.jitter: torch.Generator | None = None
        self.kept: dict[str, tuple[Folded, Tensor, Tensor | None]] | None = None
        # Operators whose results training compares with others, and what changes their gradients.
        self.compared: dict[str, Callable[[Tensor], Tensor]] = {}
        # Which way all values of a tensor move, 0 for either; None where each moves on its own.
        self._together: int | None = None
        self._normalized: set[str] = set()  # operators that have computed their BatchNorm, until it is its turn

    def recording(self) -> AbstractContextManager[list[tuple[str, Tensor]]]:
        """Record the integers of every quantized tensor, in the order of execution."""
        return self._with("recorded", [])

    @contextmanager
    def jittering(self, draw: int = 0) -> Iterator[None]:
        """Move values before they are rounded, by as little as another order of the same float32 arithmetic would.

        Even draws move each value by an amount of its own. Odd ones move all values of a tensor alike: the first every
        tensor down, the second up, others each either way.
        """
        self.jitter = torch.Generator().manual_seed(draw)
        self._together = None if draw % 2 == 0 else {1: -1, 3: 1}.get(draw, 0)
        try:
            yield
        finally:
            self.jitter = None

    def measuring(self, means: InputMeans | None) -> AbstractContextManager[Any]:
        """Let observed calls also count for the means of what weighted operators read."""
        return self._with("input_means", means)

    @contextmanager
    def observing_beside(self, others: Sequence[tuple[Quantizers, InputMeans | None]]) -> Iterator[None]:
        """Let others observe the same run."""
        self.beside = others
        try:
            yield
        finally:
            self.beside = ()

    def watching(self, watcher: Callable[[str, Tensor], None]) -> AbstractContextManager[Any]:
        """Show the float values of every edge to a function."""
        return self._with("watcher", watcher)

    @contextmanager
    def comparing(self, compared: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Pass the results of operators through functions, which return them."""
        self.compared = compared
        try:
            yield
        finally:
            self.compared = {}

    def keeping_weights(self) -> AbstractContextManager[Any]:
        """Round weights once, which do not change while a block runs."""
        return self._with("kept", dict[str, tuple[Folded, Tensor, Tensor | None]]())

    @contextmanager
    def _with(self, name: str, value: Any) -> Iterator[Any]:
        setattr(self, name, value)
        try:
            yield value
        finally:
            setattr(self, name, None)

    @contextmanager
    def quantizing_only(self, identities: frozenset[str]) -> Iterator[None]:
        """Round the weights of these operators and the values of these edges alone."""
        self.only = identities
        try:
            yield
        finally:
            self.only = None
            self._normalized.clear()
