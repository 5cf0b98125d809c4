"""Let the next layer's bias hold what all values of a channel have in common.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1.3: for a ReLU, r(W x + b - c) = r(W x + b) - c wherever
W x + b > c, so c moves through the next weights into the next bias. There c is max(0, beta - 3 gamma) of a BatchNorm;
here it is the least value that calibration saw, which keeps the function on all of that data. Without an activation
any constant may move: the middle of each channel's range makes that of the tensor least. Source: Wei et al. 2023,
"Outlier Suppression+", arXiv:2304.09145 (channel-wise shifting).
"""

import torch
from torch import Tensor

from lightning_quant.calibrate.channels_read import activation_extremes
from lightning_quant.calibrate.groups import ScalingGroup
from lightning_quant.calibrate.rescale import rescale
from lightning_quant.calls.calls import Call
from lightning_quant.simulate.prepared import Prepared

# Share of a tensor's range that the widest of its channels may take for their middles to be worth moving.
_NARROWER = 0.9


@torch.no_grad()
def absorb(prepared: Prepared, groups: list[ScalingGroup], calls: list[Call]) -> dict[ScalingGroup, float]:
    """Absorb constants where that is exact on the calls; return the largest one of every group that had any.

    A reader that pads with zeros rules it out: its padding would have to be the negative constant. So do operators
    between writer and reader.

    Args:
        prepared: detached and calibrated.
        groups: from `scaling_groups`.
        calls: of the module.
    """
    wanted = [g for g in groups if g.producers and g.activated and not (g.padded or g.links or g.from_float)]
    absorbed = {}
    for group, (low, _) in activation_extremes(prepared, wanted, calls).items():
        constant = low.clamp(min=0)
        # A channel that sits at its clip all the time has no slope to keep.
        constant = torch.where(constant < group.clip, constant, torch.zeros_like(constant))
        if bool((constant > 0).any()):
            rescale(prepared, group, torch.ones_like(constant), constant)
            absorbed[group] = float(constant.max())
    return absorbed


@torch.no_grad()
def center_channels(prepared: Prepared, groups: list[ScalingGroup], calls: list[Call]) -> int:
    """Take the middle of each channel's range out of tensors behind no activation; return of how many.

    Those whose range becomes no narrower by it stay as they are.

    Args:
        prepared: detached and calibrated; ranges and bias corrections belong to the old grids afterwards.
        groups: from `scaling_groups`.
        calls: of the module.
    """
    number = 0
    for group, (low, high) in activation_extremes(prepared, [g for g in groups if g.can_shift], calls).items():
        shift = middle(low, high)
        if shift is not None:
            rescale(prepared, group, torch.ones_like(low), shift)
            number += 1
    return number


def middle(low: Tensor, high: Tensor) -> Tensor | None:
    """Return the middle of each channel's range, `(channels,)`; None where the tensor's becomes no narrower by it."""
    is_narrower = (high - low).amax() < _NARROWER * (high.amax() - low.amin())
    return (low + high) / 2 if bool(is_narrower) else None
