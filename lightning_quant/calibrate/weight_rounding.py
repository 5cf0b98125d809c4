"""Weights on coarse grids: scales of least error, and GPTQ for the layers of a calibrated model.

Rounding with scales by the largest magnitude is right for eight bits. With four, the few largest weights of a channel
cost all others too much.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_quant.calibrate.lockstep import Site, lockstep
from lightning_quant.calibrate.output_correction import correct_output
from lightning_quant.calibrate.rescale import along_rows, folded_layer
from lightning_quant.calls.calls import Call
from lightning_quant.numerics.gptq import Hessian, gptq, output_error
from lightning_quant.simulate.prepared import Prepared

_NUM_CANDIDATES = 50


@torch.no_grad()
def least_error_scale(weight: Tensor, scale: Tensor, quant_max: int) -> Tensor:
    """Return for each output channel the scale of least squared error, `(out_channels,)`, none above the given one.

    Source: Choukroun et al. 2019, arXiv:1902.06822, equation 2, by search.

    Args:
        weight: `(out_channels, ...)`.
        scale: `(out_channels,)`, by the largest magnitudes.
        quant_max: highest integer of the grid.
    """
    flat = weight.flatten(1)
    best, least = scale.clone(), torch.full_like(scale, float("inf"))
    for share in torch.linspace(1, 0.3, _NUM_CANDIDATES):
        candidate = (scale * share).unsqueeze(1)
        rounded = torch.round(flat / candidate).clamp_(-quant_max, quant_max) * candidate
        error = (rounded - flat).square().sum(1)
        best = torch.where(error < least, candidate.squeeze(1), best)
        least = torch.minimum(error, least)
    return best


@torch.no_grad()
def shrink_scales(prepared: Prepared) -> int:
    """Give every layer the weight scales of least error; return how many layers changed.

    A channel whose scale was stretched for the sake of its bias keeps it.

    Args:
        prepared: detached and calibrated; bias corrections belong to the old scales afterwards.
    """
    number = 0
    for identity, operator in prepared.operators.items():
        if not operator.weight:
            continue
        layer, folded = folded_layer(prepared, identity), prepared.folded(identity)
        quant_max = prepared.weight_quant_max(identity)
        natural = layer.weight.abs().flatten(1).amax(1) / quant_max
        scale = least_error_scale(layer.weight, natural, quant_max)
        scale = torch.where(folded.scale > natural * 1.001, folded.scale, scale).clamp(min=1e-12)
        number += bool((scale < folded.scale).any())
        prepared.layers[identity] = replace(layer, scale=scale)
    return number


@torch.no_grad()
def gptq_layers(prepared: Prepared, calls: list[Call]) -> int:
    """Round the weights of all ungrouped layers by GPTQ, on what they read in the quantized model; return how many.

    Errors are those around each output's mean, which the bias restores: later layers see it corrected. A layer keeps
    rounding to nearest where that makes less error on the calls.

    Args:
        prepared: detached and calibrated.
        calls: of the module.
    """
    changed = []

    def visit(site: Site) -> None:
        layer = folded_layer(prepared, site.identity)
        if site.options.get("groups", 1) != 1 or site.operator.kind not in ("linear", "conv2d"):
            return
        flat = layer.weight.flatten(1)
        hessian = Hessian(flat.shape[1], flat.device)
        for x in site.quantized_inputs:
            hessian.update(x if site.operator.kind == "linear" else _patches(x, layer.weight, site))
        folded, quant_max = prepared.folded(site.identity), prepared.weight_quant_max(site.identity)
        scale = along_rows(folded.scale, flat)
        spread = hessian.covariance
        integers = gptq(flat, spread, folded.scale, -quant_max, quant_max).float()
        nearest = prepared.weight_integers(site.identity, folded).flatten(1)
        if output_error(flat, integers * scale, spread) < output_error(flat, nearest * scale, spread):
            integers = integers.view_as(layer.weight)
            prepared.layers[site.identity] = replace(layer, scale=folded.scale, integers=integers)
            correct_output(prepared, site)
            changed.append(site.identity)

    lockstep(prepared, calls, visit)
    return len(changed)


def _patches(x: Tensor, weight: Tensor, site: Site) -> Tensor:
    """Return the inputs of every output of a convolution, `(outputs, in_channels * places)`."""
    options = {name: site.options[name] for name in ("stride", "dilation")}
    padding = site.options["padding"]
    if isinstance(padding, str):
        total = [d * (k - 1) for d, k in zip(_pair(options["dilation"]), weight.shape[2:], strict=True)]
        sides = [] if padding == "valid" else [n for t in reversed(total) for n in (t // 2, t - t // 2)]
        x, padding = F.pad(x, sides) if sides else x, 0
    unfolded = F.unfold(x, tuple(weight.shape[2:]), padding=padding, **options)
    return unfolded.transpose(1, 2).flatten(0, 1)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value, value)
