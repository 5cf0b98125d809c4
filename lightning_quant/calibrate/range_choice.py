"""Choose the range of each tensor by the error that it makes at the output of the layers that read it.

The range of least error on the tensor itself may clip a few values that the next layer's weights make much of. So the
candidates are compared behind those weights. Source of the criterion: Nagel et al. 2021, arXiv:2106.08295, section
3.1 (ranges), with the loss moved from the tensor to the layer's output as in section 3.4.
"""

import torch
from torch import Tensor

from lightning_quant.calibrate.lockstep import Site, lockstep
from lightning_quant.calibrate.rescale import folded_layer
from lightning_quant.calls.calls import Call
from lightning_quant.errors import QuantizationError
from lightning_quant.numerics.fake_quantize import affine_parameters, channel_maximum, fake_quantize, weight_scale
from lightning_quant.numerics.grid import Grid
from lightning_quant.ranges.observers import Histogram
from lightning_quant.simulate.prepared import Prepared

PERCENTILES = (99.9, 99.99, 99.999)
Range = tuple[Tensor, Tensor]


def candidate_ranges(observer: Histogram, grid: Grid) -> list[Range]:
    """Return the ranges to choose from: all values, least squared error, and percentiles."""
    ranges = [(observer.low, observer.high), observer.least_error_range(grid)]
    return ranges + [observer.percentile_range(percentile) for percentile in PERCENTILES]  # type: ignore[return-value]


@torch.no_grad()
def choose_ranges(prepared: Prepared, calls: list[Call]) -> int:
    """Fix the range of every edge that a weighted operator reads; return how many changed.

    Bias corrections stay valid, since they make up for the weights alone.

    Args:
        prepared: detached and calibrated with a histogram observer ("mse" or "percentile").
        calls: of the module.

    Raises:
        QuantizationError: the observers keep no histogram.
    """
    errors: dict[str, list[float]] = {}
    candidates: dict[str, list[Range]] = {}

    def visit(site: Site) -> None:
        edge = prepared.ranges.source(site.operator.reads[0])
        observer = prepared.ranges.observers[edge]
        if not isinstance(observer, Histogram):
            raise QuantizationError(
                f"Expected a recipe with a histogram observer, but got {prepared.observer!r}. Use 'mse'."
            )
        if edge not in candidates:
            candidates[edge] = candidate_ranges(observer, prepared.ranges.grid_of(edge))
            errors[edge] = [0.0] * len(candidates[edge])
        weight = folded_layer(prepared, site.identity).weight
        for index, error in enumerate(reader_errors(site, weight, candidates[edge], prepared)):
            errors[edge][index] += error

    lockstep(prepared, calls, visit, quantized=False)
    changed = 0
    for edge, values in errors.items():
        best = candidates[edge][min(range(len(values)), key=values.__getitem__)]
        changed += best != prepared.ranges.observers[edge].range()
        prepared.ranges.choose(edge, *best)
    return changed


def reader_errors(site: Site, weight: Tensor, ranges: list[Range], prepared: Prepared) -> list[float]:
    """Return the error of one operator's output for each range of its input, relative to the output's power."""
    references = [site.compute(x, weight, None) for x in site.float_inputs]
    power = sum(float(y.square().sum()) for y in references) or 1.0
    weight = round_weight(weight, prepared.weight_quant_max(site.identity))
    integers = prepared.ranges.grid_of(site.operator.reads[0])
    result = []
    for low, high in ranges:
        parameters = affine_parameters(low, high, integers)
        rounded = [site.compute(fake_quantize(x, *parameters, integers), weight, None) for x in site.float_inputs]
        errors = [y - reference for y, reference in zip(rounded, references, strict=True)]
        result.append(error_power(errors, site.channel_axis) / power)
    return result


def error_power(errors: list[Tensor], axis: int) -> float:
    """Return the sum of squares of errors less each channel's mean, which bias correction takes away."""
    by_channel = torch.cat([error.movedim(axis, 0).flatten(1) for error in errors], 1)
    return float((by_channel - by_channel.mean(1, keepdim=True)).square().sum())


def round_weight(weight: Tensor, quant_max: int) -> Tensor:
    """Round a weight to nearest on the grid of its channels' largest magnitudes."""
    scale = weight_scale(channel_maximum(weight), quant_max).view(-1, *[1] * (weight.dim() - 1))
    return torch.round(weight / scale) * scale
