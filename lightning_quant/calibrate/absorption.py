"""High-bias absorption: let the next layer's bias hold what a channel never falls below.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1.3: for a ReLU, r(W x + b - c) = r(W x + b) - c wherever
W x + b > c, so c moves through the next weights into the next bias. There c is max(0, beta - 3 gamma) of a BatchNorm;
here it is the least value that calibration saw, which keeps the function on all of that data.
"""

import torch

from lightning_quant.calibrate.channels_read import activation_minima
from lightning_quant.calibrate.groups import ScalingGroup
from lightning_quant.calibrate.rescale import rescale
from lightning_quant.calls.calls import Call
from lightning_quant.simulate.prepared import Prepared


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
    for group, constant in activation_minima(prepared, wanted, calls).items():
        # A channel that sits at its clip all the time has no slope to keep.
        constant = torch.where(constant < group.clip, constant, torch.zeros_like(constant))
        if bool((constant > 0).any()):
            rescale(prepared, group, torch.ones_like(constant), constant)
            absorbed[group] = float(constant.max())
    return absorbed
