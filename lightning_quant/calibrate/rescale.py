"""Move a factor and a shift per channel out of a tensor, into the weights around it."""

from dataclasses import replace

import torch
from torch import Tensor

from lightning_quant.calibrate.groups import ScalingGroup
from lightning_quant.numerics.adjustments import ChannelScale, FoldedLayer, unscaled
from lightning_quant.numerics.fake_quantize import along
from lightning_quant.numerics.folding import merged
from lightning_quant.simulate.prepared import Prepared


@torch.no_grad()
def folded_layer(prepared: Prepared, identity: str) -> FoldedLayer:
    """Return a weighted operator with its BatchNorm folded in, as it is before rounding and bias correction.

    No range is needed for it.
    """
    if identity in prepared.layers:
        return prepared.layers[identity]
    weight = prepared.weight(identity).detach().float()
    gain, bias = merged(*prepared.bias_and_norm(identity, weight))
    if gain is not None:
        weight = weight * along_rows(gain, weight)
    return FoldedLayer(weight.clone(), weight.new_zeros(len(weight)) if bias is None else bias.detach().float().clone())


@torch.no_grad()
def rescale(prepared: Prepared, group: ScalingGroup, factor: Tensor, shift: Tensor | None = None) -> None:
    """Let a group's grids hold `(x - shift) / factor` and its layers make up for it; the function stays.

    Ranges and bias corrections belong to the unscaled grids afterwards: calibrate again.

    Args:
        prepared: detached; its layers and channel scales are updated.
        group: from `scaling_groups`; a shift needs one without links and without padding readers.
        factor: `(channels,)`, positive.
        shift: `(channels,)`, in units of the present grid.
    """
    shift = torch.zeros_like(factor) if shift is None else shift
    for identity in group.producers:
        layer = folded_layer(prepared, identity)
        prepared.layers[identity] = replace(_by_rows(layer, 1 / factor), bias=(layer.bias - shift) / factor)
    for identity in group.consumers:
        layer = folded_layer(prepared, identity)
        moved = (layer.weight * along_columns(shift, layer.weight)).flatten(1).sum(1)
        factors = along_columns(factor, layer.weight)
        if layer.weight.shape[1] == 1:
            scaled = _by_rows(layer, factors.flatten())
        else:
            # Within a channel weights change by different factors: they have to be rounded anew.
            scaled = replace(layer, weight=layer.weight * factors, scale=None, integers=None)
        prepared.layers[identity] = replace(scaled, bias=layer.bias + moved)
    for edge in group.edges:
        old = prepared.channels.get(edge) or unscaled(group.channels, group.axis).to(factor.device)
        prepared.channels[edge] = ChannelScale(
            old.factor * factor, old.shift + old.factor * shift, group.axis, group.clip
        )


def _by_rows(layer: FoldedLayer, factor: Tensor) -> FoldedLayer:
    """Multiply each output channel's weights by a factor, `(out_channels,)`; their integers stay."""
    scale = None if layer.scale is None else layer.scale * factor
    return replace(layer, weight=layer.weight * along_rows(factor, layer.weight), scale=scale)


def along_rows(values: Tensor, weight: Tensor) -> Tensor:
    """Shape values per output channel so that they multiply a weight."""
    return along(values, weight)


def along_columns(values: Tensor, weight: Tensor) -> Tensor:
    """Shape values per input channel so that they multiply a weight, `(out_channels, in_channels // groups, ...)`."""
    by_group = values.view(-1, weight.shape[1])
    rows = by_group.repeat_interleave(len(weight) // len(by_group), 0)
    return rows.view(*rows.shape, *[1] * (weight.dim() - 2))
