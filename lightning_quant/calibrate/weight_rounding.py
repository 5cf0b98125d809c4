"""Weights on coarse grids: scales of least error, and GPTQ for the layers of a calibrated model.

Rounding with scales by the largest magnitude is right for eight bits. With four, the few largest weights of a channel
cost all others too much.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_quant.calibrate.lockstep import Site, lockstep
from lightning_quant.calibrate.output_correction import correct_output
from lightning_quant.calibrate.rescale import folded_layer
from lightning_quant.calls.calls import Call
from lightning_quant.numerics.fake_quantize import least_error_scale
from lightning_quant.numerics.grouped_gptq import GroupedCovariance, grouped_error, grouped_gptq
from lightning_quant.simulate.prepared import Prepared

_KINDS = ("linear", "conv1d", "conv2d", "conv3d")
# Inputs of an output that layers have at most: the matrix of n inputs takes 8 n² bytes, a few times over, and work of
# order n³. Grids of few bits gain so much more that they get 1.3 GB and minutes where eight bits get 42 MB and seconds.
_MOST_INPUTS, _MOST_INPUTS_FEW_BITS = 2304, 12_800
# Outputs that a layer is rounded by, at least.
_NUM_INPUTS = 8192


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
def gptq_layers(prepared: Prepared, calls: list[Call], *, corrects_all: bool = False) -> int:
    """Round the weights of all layers by GPTQ, on what they read in the quantized model; return how many.

    Errors are those around each output's mean, which the bias restores: later layers see it corrected. A layer keeps
    rounding to nearest where that makes less error on the calls, and where each of its outputs is made of very many
    inputs: more than 2,304, with weights of four bits or fewer 12,800.

    Args:
        prepared: detached and calibrated.
        calls: of the module.
        corrects_all: whether biases are corrected by the outputs of all layers, not only of those that change.
    """
    changed = []

    def visit(site: Site) -> None:
        if _is_rounded(prepared, site) and _round(prepared, site):
            changed.append(site.identity)
        elif not corrects_all:
            return
        correct_output(prepared, site)

    lockstep(prepared, calls, visit)
    return len(changed)


def _is_rounded(prepared: Prepared, site: Site) -> bool:
    if site.operator.kind not in _KINDS or not any(x.numel() for x in site.quantized_inputs):
        return False
    most = _MOST_INPUTS_FEW_BITS if prepared.weight_quant_max(site.identity) < 8 else _MOST_INPUTS
    return prepared.weight(site.identity)[0].numel() <= most


def _round(prepared: Prepared, site: Site) -> bool:
    layer, folded = folded_layer(prepared, site.identity), prepared.folded(site.identity)
    quant_max = prepared.weight_quant_max(site.identity)
    groups = int(site.options.get("groups", 1))
    inputs = [x for x in site.quantized_inputs if x.numel()]
    places = -(-max(_NUM_INPUTS, 4 * layer.weight[0].numel()) // sum(map(len, inputs)))
    covariance = GroupedCovariance()
    for x in inputs:
        covariance.update(inputs_of_outputs(x, layer.weight, site, places))
    spread = covariance.mean
    weight, scale = layer.weight.view(groups, -1, spread.shape[1]), folded.scale.view(groups, -1)
    integers = grouped_gptq(weight, spread, scale, quant_max)
    nearest = prepared.weight_integers(site.identity, folded).view_as(integers)
    learned, rounded = (grouped_error(i * scale.unsqueeze(2) - weight, spread) for i in (integers, nearest))
    if learned >= rounded:
        return False
    prepared.layers[site.identity] = replace(layer, scale=folded.scale, integers=integers.view_as(layer.weight))
    return True


def inputs_of_outputs(x: Tensor, weight: Tensor, site: Site, places: int) -> Tensor:
    """Return what some outputs of each sample are computed from, `(groups, outputs, in_features)`.

    Args:
        x: what the operator reads.
        weight: its weight.
        site: the operator.
        places: how many outputs of a sample, the same ones in all, evenly spaced but for a random share.
    """
    if site.operator.kind == "linear":
        rows = x.reshape(len(x), -1, x.shape[-1])
        return rows[:, _some(rows.shape[1], places)].reshape(1, -1, x.shape[-1])
    sides = _sides(weight, site)
    view = F.pad(x, sides) if any(sides) else x
    dilation = _each(site.options["dilation"], weight)
    for axis, (size, step, stride) in enumerate(
        zip(weight.shape[2:], dilation, _each(site.options["stride"], weight), strict=True)
    ):
        view = view.unfold(2 + axis, step * (size - 1) + 1, stride)[..., ::step]
    shape = view.shape[2 : x.dim()]
    chosen = torch.unravel_index(_some(math.prod(shape), places), shape)
    # Samples, channels, places and the kernel's own dimensions.
    at_places: Any = (slice(None), slice(None), *chosen)
    taken = view[at_places].flatten(3)
    groups = x.shape[1] // weight.shape[1]
    samples, _, number, inner = taken.shape
    parts = taken.reshape(samples, groups, weight.shape[1], number, inner).permute(1, 0, 3, 2, 4)
    return parts.reshape(groups, samples * number, weight.shape[1] * inner)


def _some(number: int, wanted: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.arange(number) if number <= wanted else torch.randperm(number, generator=generator)[:wanted].sort()[0]


def _sides(weight: Tensor, site: Site) -> list[int]:
    """Return how much a convolution pads, last dimension first, as `F.pad` takes it."""
    padding = site.options["padding"]
    if not isinstance(padding, str):
        return [n for side in reversed(_each(padding, weight)) for n in (side, side)]
    if padding == "valid":
        return []
    dilation = _each(site.options["dilation"], weight)
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return [n for t in reversed(total) for n in (t // 2, t - t // 2)]


def _each(value: int | tuple[int, ...], weight: Tensor) -> tuple[int, ...]:
    """Return a setting for every dimension of the kernel."""
    number = weight.dim() - 2
    value = tuple(value) if isinstance(value, tuple | list) else (value,)
    return value if len(value) == number else value * number
