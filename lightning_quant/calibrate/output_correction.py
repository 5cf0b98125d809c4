"""Empirical bias correction: make every layer's mean output that of the float model, layer after layer.

The analytic correction knows the rounding of the layer's own weights. This one also sees what rounding and clipping in
all layers before did to the mean of its input. Source: Nagel et al. 2019, arXiv:1906.04721, appendix D.
"""

import torch
from torch import Tensor

from lightning_quant.calibrate.lockstep import Site, lockstep
from lightning_quant.calibrate.rescale import along_rows, folded_layer
from lightning_quant.calls.calls import Call
from lightning_quant.simulate.prepared import Prepared


@torch.no_grad()
def correct_outputs(prepared: Prepared, calls: list[Call]) -> int:
    """Replace every bias correction by the one that restores the mean of the output; return how many layers.

    Args:
        prepared: detached and calibrated; its weights are final.
        calls: of the module.
    """
    corrected = []

    def visit(site: Site) -> None:
        correct_output(prepared, site)
        corrected.append(site.identity)

    lockstep(prepared, calls, visit)
    return len(corrected)


def correct_output(prepared: Prepared, site: Site) -> None:
    """Restore the mean of one layer's output, with the weight that it has now."""
    layer = folded_layer(prepared, site.identity)
    folded = prepared.folded(site.identity, corrected=False)
    weight = prepared.weight_integers(site.identity, folded)
    weight = weight * along_rows(folded.scale, weight)
    exact = mean_output(site, site.float_inputs, layer.weight)
    prepared.bias_corrections[site.identity] = (exact - mean_output(site, site.quantized_inputs, weight)).float()


def mean_output(site: Site, inputs: list[Tensor], weight: Tensor) -> Tensor:
    """Return the mean over inputs of each channel that an operator returns without its bias, `(channels,)`, float64.

    An operator is linear: the sum of the outputs of a call's samples is the output of their sum.
    """
    total, number = torch.zeros((), dtype=torch.float64, device=weight.device), 0
    for x in inputs:
        samples = x.numel() // max(x.shape[-1], 1) if site.operator.kind == "linear" else len(x)
        if not x.numel():
            continue
        # Of a linear operator every leading dimension is one of samples.
        flat = x.reshape(-1, x.shape[-1]) if site.operator.kind == "linear" else x
        y = site.compute(flat.sum(0, keepdim=True, dtype=torch.float64), weight.double(), None)
        by_channel = y.movedim(site.channel_axis, 0).flatten(1)
        total = total + by_channel.sum(1)
        number += samples * by_channel.shape[1]
    return total / max(number, 1)
