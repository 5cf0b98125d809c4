"""Choose the factor of each channel of every scaling group by the error behind the layers that read it.

A factor moves the differences between channels into the weights that read them, as in `smoothing`, whose strength is
chosen here group by group: what rounding the tensor and rounding its readers' weights does to their outputs is
computed from a sample of what they read in the float model, without running the model for each candidate. Before that
tensors whose channels lie apart are centered: see `absorption`.
Sources: Xiao et al. 2022, arXiv:2211.10438, equation 4 (the factors); Nagel et al. 2021, arXiv:2106.08295, section 3.1
(errors of clipping and rounding).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_quant.calibrate.absorption import center_channels
from lightning_quant.calibrate.edge_samples import Sample, sample_edges
from lightning_quant.calibrate.groups import ScalingGroup, worth_scaling
from lightning_quant.calibrate.rescale import along_columns, folded_layer, rescale
from lightning_quant.calibrate.smoothing import column_maximum, smoothing_factor, within_clip
from lightning_quant.calls.calls import Call
from lightning_quant.numerics.fake_quantize import affine_parameters, channel_maximum, fake_quantize, weight_scale
from lightning_quant.simulate.prepared import Prepared

STRENGTHS = (0.5, 0.75, 1.0)
# Shares of its range that a tensor may be clipped to.
SHARES = (1.0, 0.9, 0.8, 0.65)
# Share of its error that a group must lose for factors to be worth it.
_LEAST_GAIN = 0.02


@dataclass
class _Reader:
    """A weighted operator that reads a group.

    Attributes:
        weight: `(out_channels, in_channels // groups, ...)`, folded.
        rows: `(rows, in_channels)`, a sample of what it reads, less the mean.
        quant_max: highest integer of its weight.
    """

    weight: Tensor
    rows: Tensor
    quant_max: int

    @cached_property
    def power(self) -> float:
        """The mean power of its outputs, positive."""
        return float(_power(self.rows, self.gains)) or 1.0

    @cached_property
    def gains(self) -> "_Gains":
        """Those of its weight."""
        return _gains(self.weight, self.rows.shape[-1])


# What weights make of inputs: a factor of the power of each, `(channels,)`, where each has outputs of its own. Else for
# every group of a layer the matrix to outputs, `(inputs, outputs)`, or that of their squares, `(inputs, inputs)`, where
# it is smaller; and whether it is that.
_Gains = Tensor | list[tuple[Tensor, bool]]


def _gains(weight: Tensor, channels: int) -> _Gains:
    """Return what a weight makes of inputs, places of a kernel taken apart."""
    places = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
    if places.shape[1] == 1:
        return places.square().sum((1, 2)).view(channels, -1).sum(1)
    matrices = [part.transpose(1, 2).flatten(0, 1) for part in places.chunk(channels // places.shape[1], 0)]
    return [(m.T @ m, True) if len(m) > m.shape[1] else (m.T, False) for m in matrices]


def _power(errors: Tensor, gains: _Gains) -> Tensor:
    """Return the mean power of outputs for rows `(..., rows, in_channels)`."""
    if isinstance(gains, Tensor):
        return (errors.square().mean(-2) * gains).sum(-1)
    total = torch.zeros(errors.shape[:-2], dtype=torch.float32, device=errors.device)
    for part, (matrix, of_squares) in zip(errors.chunk(len(gains), -1), gains, strict=True):
        product = part @ matrix
        total = total + (product * (part if of_squares else product)).sum(-1).mean(-1)
    return total


@torch.no_grad()
def choose_channels(
    prepared: Prepared, every: list[ScalingGroup], calls: list[Call], samples: dict[str, Sample] | None = None
) -> int:
    """Center what can be, and rescale every group by the factors of least error; return how many times that gains.

    Groups that a float operator writes are left, for which every factor is a multiplication more: but for those of
    linear layers in nets with LayerNorm. Ranges and bias corrections belong to the old grids afterwards.

    Args:
        prepared: detached and calibrated.
        every: from `scaling_groups`.
        calls: of the module; they give the activations.
        samples: what an earlier run of all calls has shown of them; they are run once more by default.
    """
    groups = worth_scaling(prepared, every)
    changed = center_channels(prepared, groups, calls)
    samples = sample_edges(prepared, groups, calls) if samples is None else samples
    samples = {edge: samples[edge].on_grid(prepared, edge) for g in groups for edge in g.edges if edge in samples}
    for group in groups:
        factor = best_factor(prepared, group, samples)
        if factor is not None:
            rescale(prepared, group, factor)
            changed += 1
    return changed


def best_factor(prepared: Prepared, group: ScalingGroup, samples: dict[str, Sample]) -> Tensor | None:
    """Return the factors of least error among the strengths, `(channels,)`; None where they gain too little."""
    seen = [samples[edge] for edge in group.edges if edge in samples]
    if not seen:
        return None
    readers = _readers(prepared, group, samples, seen[0])
    maximum = torch.stack([torch.maximum(s.low.abs(), s.high.abs()) for s in seen]).amax(0).clamp(max=group.clip)
    columns = column_maximum([reader.weight for reader in readers], group.channels)
    best, least = None, (1 - _LEAST_GAIN) * _error(prepared, group, seen, readers, torch.ones_like(maximum))
    for strength in STRENGTHS:
        factor = within_clip(smoothing_factor(maximum, columns, strength), maximum, group.clip)
        error = _error(prepared, group, seen, readers, factor, most=least)
        if error < least:
            best, least = factor, error
    return best


def _readers(prepared: Prepared, group: ScalingGroup, samples: dict[str, Sample], other: Sample) -> list[_Reader]:
    readers = []
    for identity in group.consumers:
        rows = samples.get(prepared.operators[identity].reads[0], other).rows
        weight = folded_layer(prepared, identity).weight
        readers.append(_Reader(weight, rows - rows.mean(0), prepared.weight_quant_max(identity)))
    return readers


def _error(
    prepared: Prepared,
    group: ScalingGroup,
    seen: list[Sample],
    readers: list[_Reader],
    factor: Tensor,
    *,
    most: float = float("inf"),
) -> float:
    """Return the error of rounding behind all readers, each relative to its power; or a part of it, if above `most`.

    That of weights comes first, which takes less work.
    """
    total = 0.0
    for reader in readers:
        weight = reader.weight * along_columns(factor, reader.weight)
        shape = (-1, *[1] * (weight.dim() - 1))
        scale = weight_scale(channel_maximum(weight), reader.quant_max).view(shape)
        lost = torch.round(weight / scale) * scale - weight
        total += float(_power(reader.rows / factor, _gains(lost, len(factor)))) / reader.power
    errors = [_rounding_errors(prepared, group, sample, factor) for sample in seen] if total < most else []
    for reader in readers:
        if total >= most:
            break
        total += sum(float(_power(error, reader.gains).min()) for error in errors) / reader.power
    return total


def _rounding_errors(prepared: Prepared, group: ScalingGroup, sample: Sample, factor: Tensor) -> Tensor:
    """Return what rounding changes of a sample for each share of its range, `(shares, rows, channels)`.

    Less the mean of each channel, which bias correction takes away.
    """
    rows = (sample.rows / factor).clamp(max=group.clip)
    low, high = (sample.low / factor).amin(), (sample.high / factor).amax().clamp(max=group.clip)
    errors = []
    grid = prepared.ranges.grid_of(group.edges[0])
    for share in SHARES:
        parameters = affine_parameters(low * share, high * share, grid)
        errors.append((fake_quantize(rows, *parameters, grid) - rows) * factor)
    stacked = torch.stack(errors)
    return stacked - stacked.mean(1, keepdim=True)
