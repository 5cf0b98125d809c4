"""What the weighted readers of tensors see of each channel, over all calls."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_quant.calibrate.groups import ScalingGroup
from lightning_quant.calibrate.lockstep import Site, lockstep
from lightning_quant.calls.calls import Call
from lightning_quant.simulate.prepared import Prepared

Measure = Callable[[Tensor, list[int]], Tensor]
Combine = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def channels_read(
    prepared: Prepared, groups: list[ScalingGroup], calls: list[Call], measure: Measure, combine: Combine
) -> dict[ScalingGroup, Tensor]:
    """Return a measure of each channel, `(..., channels)`, of every group that a call reaches.

    Args:
        prepared: detached and calibrated.
        groups: from `scaling_groups`.
        calls: of the module.
        measure: from values and all their dimensions but the channels' to numbers for each channel.
        combine: of the numbers of two tensors.
    """
    readers = {identity: group for group in groups for identity in group.consumers}
    by_group: dict[ScalingGroup, Tensor] = {}

    def visit(site: Site) -> None:
        group = readers.get(site.identity)
        if group is None:
            return
        for x in site.float_inputs:
            value = measure(x, [d for d in range(x.dim()) if d != group.axis])
            by_group[group] = combine(by_group[group], value) if group in by_group else value

    lockstep(prepared, calls, visit, quantized=False)
    return by_group


def activation_maxima(prepared: Prepared, groups: list[ScalingGroup], calls: list[Call]) -> dict[ScalingGroup, Tensor]:
    """Return the largest magnitude of each channel that the weighted readers of each group see."""
    return channels_read(prepared, groups, calls, lambda x, places: x.abs().amax(places), torch.maximum)


def activation_extremes(
    prepared: Prepared, groups: list[ScalingGroup], calls: list[Call]
) -> dict[ScalingGroup, tuple[Tensor, Tensor]]:
    """Return the least and the highest value of each channel that the weighted readers of each group see."""
    ends = channels_read(prepared, groups, calls, lambda x, d: torch.stack([-x.amin(d), x.amax(d)]), torch.maximum)
    return {group: (-low, high) for group, (low, high) in ends.items()}
