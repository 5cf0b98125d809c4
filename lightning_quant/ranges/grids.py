"""What a run of a graph saw of its tensors, and the scales that follow for the next: all edges side by side."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_quant.numerics.fake_quantize import affine_parameters
from lightning_quant.numerics.grid import widened

if TYPE_CHECKING:
    from lightning_quant.ranges.ranges import Ranges


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


def widen(ranges: "Ranges", more_bits: int) -> None:
    """Round to grids with so many bits more than the recipe's, up to eight."""
    grid, by_edge = ranges.narrow
    ranges.more_bits, ranges.grid = more_bits, widened(grid, more_bits)
    ranges.grids_by_edge = {identity: widened(own, more_bits) for identity, own in by_edge.items()}
    ranges.forget_parameters()


def joined(parts: Sequence[Seen]) -> Seen:
    """Return the extremes of all that was seen, once for each edge."""
    ends: dict[str, tuple[Tensor, Tensor]] = {}
    for seen in parts:
        for identity, low, high in zip(seen.edges, seen.lows.unbind(), seen.highs.unbind(), strict=True):
            other_low, other_high = ends.get(identity, (low, high))
            ends[identity] = torch.minimum(low, other_low), torch.maximum(high, other_high)
    lows, highs = zip(*ends.values(), strict=True)
    return Seen(tuple(ends), torch.stack(lows), torch.stack(highs))


def padded_members(observed: Iterable[str], members: Mapping[str, Iterable[str]], groups: Iterable[str]) -> Tensor:
    """Return `(edges, most members of a group)`: places of the observers that an edge's range is the union of.

    Args:
        observed: edges with an observer, in the order of these.
        members: group to its observed edges.
        groups: of each edge.
    """
    places = {identity: place for place, identity in enumerate(observed)}
    rows = [[places[member] for member in members[group]] for group in groups]
    longest = max(map(len, rows))
    return torch.tensor([row + row[:1] * (longest - len(row)) for row in rows])


def scales_of(ranges: "Ranges", lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and zero points of all edges, `(edges,)`, from the ends of their ranges or as learned."""
    scales, zero_points = affine_parameters(lows, highs, ranges.grid)
    if ranges.wide:
        is_wide = torch.tensor([identity in ranges.wide for identity in ranges.edges], device=lows.device)
        wide_scales, wide_points = affine_parameters(lows, highs, ranges.grid_of(next(iter(ranges.wide))))
        scales, zero_points = scales.where(~is_wide, wide_scales), zero_points.where(~is_wide, wide_points)
    if ranges.learned is not None:
        for identity, edge in ranges.edges.items():
            learned = ranges.learned.parameters(edge.shared, ranges.grid_of(identity))
            if learned is not None:
                scales[ranges.rows[identity]], zero_points[ranges.rows[identity]] = learned
    return scales, zero_points
