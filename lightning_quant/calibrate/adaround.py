"""AdaRound: learn for every weight whether to round it up or down, so that the layer's output stays.

Source: Nagel et al. 2020, arXiv:2004.10568, equations 21 to 25: the weight is floor(w / s) + h(v) with the rectified
sigmoid h, trained on the squared output error plus a term that drives h to 0 or 1 as its exponent beta falls.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_quant.calibrate.lockstep import Site, lockstep
from lightning_quant.calibrate.rescale import along_rows, folded_layer
from lightning_quant.calls.calls import Call
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.terminal.progress import bar

_STRETCH_LOW, _STRETCH_HIGH = -0.1, 1.1
_WARM_UP = 0.2
_BETA_START, _BETA_END = 20.0, 2.0


@dataclass(frozen=True)
class Reconstruction:
    """What became of one layer.

    Attributes:
        identity: the operator.
        nearest: squared error of its output with weights rounded to nearest, relative to the output's power.
        learned: the same with the rounding that was kept, never more than `nearest`.
    """

    identity: str
    nearest: float
    learned: float


def adaround(
    prepared: Prepared,
    calls: list[Call],
    *,
    iterations: int = 400,
    learning_rate: float = 0.1,
    regularization: float = 0.1,
    batch: int = 32,
) -> list[Reconstruction]:
    """Learn the rounding of every layer, in the order of execution, on what it reads in the quantized model.

    A layer whose output error on all calls did not fall keeps rounding to nearest.

    Args:
        prepared: detached and calibrated; ranges and scales stay.
        calls: of the module.
        iterations: steps of Adam for each layer.
        learning_rate: of Adam.
        regularization: weight of the term that drives every choice to up or down.
        batch: samples in a step.

    Returns:
        one entry for each layer that was tried.
    """
    results: list[Reconstruction] = []
    number = sum(bool(operator.weight) for operator in prepared.operators.values())
    progress = bar("AdaRound", "layer", total=number)

    def visit(site: Site) -> None:
        progress.set_postfix_str(site.operator.name)
        if any(x.numel() for x in site.quantized_inputs):
            results.append(_reconstruct(prepared, site, iterations, learning_rate, regularization, batch))
        progress.update()

    with progress:
        lockstep(prepared, calls, visit)
    return results


def _reconstruct(
    prepared: Prepared, site: Site, iterations: int, learning_rate: float, regularization: float, batch: int
) -> Reconstruction:
    layer = folded_layer(prepared, site.identity)
    folded = prepared.folded(site.identity)
    scale = along_rows(folded.scale, layer.weight)
    inputs, exact = _by_shape(site.quantized_inputs), _by_shape(site.float_inputs)
    # The bias correction is part of the layer: what is learned comes on top of it.
    shift = (folded.bias - layer.bias).view(-1, *[1] * (layer.weight.dim() - 2))
    targets = [site.compute(x, layer.weight, None) - shift for x in exact]
    nearest = prepared.weight_integers(site.identity, folded)
    learned = learn_rounding(
        lambda x, weight: site.compute(x, weight, None),
        layer.weight,
        scale,
        inputs,
        targets,
        prepared.weight_quant_max(site.identity),
        iterations=iterations,
        learning_rate=learning_rate,
        regularization=regularization,
        batch=batch,
    )
    power = sum(float(y.square().sum()) for y in targets) or 1.0

    def error(integers: Tensor) -> float:
        pairs = zip(inputs, targets, strict=True)
        return sum(float((site.compute(x, integers * scale, None) - y).square().sum()) for x, y in pairs)

    errors = [error(nearest), error(learned)]
    if errors[1] < errors[0]:
        prepared.layers[site.identity] = replace(layer, scale=folded.scale, integers=learned)
    return Reconstruction(site.identity, errors[0] / power, min(errors) / power)


def _by_shape(tensors: list[Tensor]) -> list[Tensor]:
    """Join tensors along the first dimension, those whose other dimensions agree."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.shape[1:], []).append(tensor)
    return [torch.cat(group) for group in groups.values()]


@torch.enable_grad()
def learn_rounding(
    compute: object,
    weight: Tensor,
    scale: Tensor,
    inputs: list[Tensor],
    targets: list[Tensor],
    quant_max: int,
    *,
    iterations: int,
    learning_rate: float,
    regularization: float,
    batch: int,
) -> Tensor:
    """Return integers for a weight, each the floor or the ceiling of `weight / scale`, float32.

    Args:
        compute: from inputs and a weight to outputs.
        weight: before rounding.
        scale: broadcast over the weight.
        inputs: samples along the first dimension, a tensor for each size of the others.
        targets: what to reproduce from them.
        quant_max: highest magnitude of the grid.
        iterations: steps.
        learning_rate: of Adam.
        regularization: weight of the rounding term.
        batch: samples in a step.
    """
    low = torch.floor(weight / scale)
    share = (weight / scale - low).clamp(1e-4, 1 - 1e-4)
    spread = _STRETCH_HIGH - _STRETCH_LOW
    values = torch.logit((share - _STRETCH_LOW) / spread).requires_grad_()
    optimizer = torch.optim.Adam([values], lr=learning_rate)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        nearest = torch.round(weight / scale).clamp(-quant_max, quant_max) * scale
        power = float((compute(inputs[0][:batch], nearest) - targets[0][:batch]).square().mean()) or 1.0  # type: ignore[operator]
    shares = torch.tensor([float(len(x)) for x in inputs], dtype=torch.float32)
    for iteration in range(iterations):
        size = 0 if len(inputs) == 1 else int(torch.multinomial(shares, 1, generator=generator))
        chosen = torch.randperm(len(inputs[size]), generator=generator)[:batch]
        up = _rectified_sigmoid(values)
        outputs = compute(inputs[size][chosen], (low + up).clamp(-quant_max, quant_max) * scale)  # type: ignore[operator]
        loss = (outputs - targets[size][chosen]).square().mean() / power
        progress = (iteration / iterations - _WARM_UP) / (1 - _WARM_UP)
        if progress > 0:
            beta = _BETA_END + 0.5 * (_BETA_START - _BETA_END) * (1 + math.cos(math.pi * progress))
            loss = loss + regularization * (1 - (2 * up - 1).abs().pow(beta)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (low + (_rectified_sigmoid(values.detach()) >= 0.5)).clamp(-quant_max, quant_max)


def _rectified_sigmoid(values: Tensor) -> Tensor:
    return (torch.sigmoid(values) * (_STRETCH_HIGH - _STRETCH_LOW) + _STRETCH_LOW).clamp(0, 1)
