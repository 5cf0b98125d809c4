"""Scales of all edges side by side are those of each."""

import torch
from residual_nets import LARGE, observing_residual


def test_scales_of_all_edges_are_those_of_each() -> None:
    _, prepared = observing_residual()
    prepared.set_phase("observe")
    prepared.root(LARGE)
    ranges = prepared.ranges
    ranges.settle()
    grids = ranges.grids()
    for identity, row in ranges.rows.items():
        scale, zero_point = ranges.parameters(identity)
        assert torch.equal(grids.scales[row], scale)
        assert torch.equal(grids.zero_points[row], zero_point)
        assert grids.numbers is not None
        assert grids.numbers[row] == (scale.item(), zero_point.item())
