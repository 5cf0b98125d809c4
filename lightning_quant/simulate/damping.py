"""Damping of weights that oscillate: a gradient that draws each one to the integer that it is rounded to.

Where the best value lies between two integers, straight-through gradients move a weight to and fro across the border.
Source: Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training", arXiv:2203.11086, equation 7 (the
regularizer, whose gradient this is) and section 5 (its weight grows from nothing with a cosine).
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from lightning_quant.numerics.fake_quantize import along
from lightning_quant.simulate.quantizers import Quantizers
from lightning_quant.surgery.routing import fetch, resolve


def growing(position: float) -> float:
    """Return the share of its weight that damping has at a position in [0, 1] of the training through rounding."""
    return (1 - math.cos(math.pi * min(max(position, 0.0), 1.0))) / 2


@torch.no_grad()
def add_damping_gradient(quantizers: Quantizers, parameters: Collection[int], strength: float) -> None:
    """Add the gradient of `strength * |clip(w) - rounded(w)|^2` to that of weights whose steps are learned.

    Args:
        quantizers: of the module that is trained.
        parameters: ids of those that an optimizer is about to move.
        strength: weight of the penalty.
    """
    learned = quantizers.learned_steps
    if learned is None or strength == 0:
        return
    for identity, operator in quantizers.operators.items():
        if not operator.weight or identity not in learned.logarithms or quantizers.computes_weight(identity):
            continue
        weight = fetch(resolve(quantizers.root, operator.path), operator.weight)
        if weight.grad is not None and id(weight) in parameters:
            quant_max = quantizers.weight_quant_max(identity)
            weight.grad.add_(_towards(weight, learned.step_of(identity, weight, quant_max), quant_max) * 2 * strength)


def _towards(weight: Tensor, step: Tensor, quant_max: int) -> Tensor:
    """Return by how much a weight that is not clipped lies above what it is rounded to."""
    ratio = (weight / along(step, weight)).clamp(-quant_max, quant_max)
    return ((ratio - ratio.round()) * along(step, weight)).to(weight.dtype)
