"""What a run of a graph saw of its tensors, and the scales that follow for the next: all edges side by side."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """The extremes that one run of a graph saw: edges, and `(edges,)` each."""

    edges: tuple[str, ...]
    lows: Tensor
    highs: Tensor


@dataclass(frozen=True)
class Grids:
    """Scale and zero point of every edge, in the order of `Ranges.rows`, float32.

    Attributes:
        scales: `(edges,)`.
        zero_points: `(edges,)`.
        numbers: the same as numbers, on the CPU, where reading them costs nothing.
        missing: edges without a range, whose values above mean nothing.
        is_complete: whether there are none.
    """

    scales: Tensor
    zero_points: Tensor
    numbers: list[tuple[float, float]] | None
    missing: frozenset[str]
    is_complete: bool
