"""Cross-layer equalization: give the weights on both sides of a tensor equal ranges in every channel.

Source: Nagel et al. 2019, arXiv:1906.04721, equations 8 to 11: with r1 the range of the weights that write a channel
and r2 that of the weights that read it, the factor sqrt(r1 / r2) makes both sqrt(r1 r2). Through ReLU6 the clip becomes
one per channel, which the end of the integer grid carries out: so no factor exceeds 1 there, nor falls below the share
of the clip that calibration saw.
"""

import torch
from torch import Tensor

from lightning_quant.calibrate.channels_read import activation_maxima
from lightning_quant.calibrate.groups import ScalingGroup
from lightning_quant.calibrate.rescale import folded_layer, rescale
from lightning_quant.calibrate.smoothing import column_maximum
from lightning_quant.calls.calls import Call
from lightning_quant.numerics.fake_quantize import channel_maximum
from lightning_quant.simulate.prepared import Prepared


@torch.no_grad()
def equalize(prepared: Prepared, groups: list[ScalingGroup], calls: list[Call], *, rounds: int = 3) -> int:
    """Rescale groups that weighted operators write and read until their weights' ranges agree; return how many.

    Ranges and bias corrections belong to the old grids afterwards: calibrate again.

    Args:
        prepared: detached and calibrated.
        groups: from `scaling_groups`.
        calls: of the module; they tell how far channels of clipping activations reach.
        rounds: passes over all groups; neighbours share layers, so one is not enough.
    """
    wanted = [group for group in groups if group.producers and not group.from_float]
    clipped = [group for group in wanted if group.clip != float("inf")]
    seen = activation_maxima(prepared, clipped, calls) if clipped else {}
    for _ in range(rounds):
        for group in wanted:
            written = [channel_maximum(folded_layer(prepared, i).weight) for i in group.producers]
            read = [folded_layer(prepared, i).weight for i in group.consumers]
            factor = equalizing_factor(torch.stack(written).amax(0), column_maximum(read, group.channels))
            if group in seen:
                before = prepared.channels.get(group.edges[0])
                reached = (seen[group] / group.clip).clamp(max=1)
                total = factor * (1 if before is None else before.factor)
                total = torch.maximum(total / total.max(), reached)
                factor = total if before is None else total / before.factor
            rescale(prepared, group, factor)
    return len(wanted)


def equalizing_factor(written: Tensor, read: Tensor) -> Tensor:
    """Return sqrt(r1 / r2) for each channel, 1 where nothing is written or read.

    Args:
        written: `(channels,)`, ranges r1 of the weights that write each channel.
        read: `(channels,)`, ranges r2 of the weights that read it.
    """
    alive = (written > 0) & (read > 0)
    ratio = torch.where(alive, written, torch.ones_like(written)) / torch.where(alive, read, torch.ones_like(read))
    return ratio.sqrt()
