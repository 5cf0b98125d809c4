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
    exact = _mean([site.compute(x, layer.weight, None) for x in site.float_inputs], site.channel_axis)
    actual = _mean([site.compute(x, weight, None) for x in site.quantized_inputs], site.channel_axis)
    prepared.bias_corrections[site.identity] = (exact - actual).float()


def _mean(outputs: list[Tensor], axis: int) -> Tensor:
    by_channel = torch.cat([y.movedim(axis, 0).flatten(1) for y in outputs], 1)
    return by_channel.double().mean(1)
