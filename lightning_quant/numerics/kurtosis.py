"""A penalty on weights whose distribution is not flat: flat ones lose least to rounding, and have no outliers.

Source: Shkolnik et al. 2020, "Robust Quantization: One Model to Rule Them All", arXiv:2002.07686, equation 10, with the
kurtosis of a uniform distribution as the target.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

UNIFORM = 1.8


def add_kurtosis_gradient(weights: Iterable[Tensor], strength: float) -> None:
    """Add the gradient of the penalty to that of each weight which has one by now.

    Args:
        weights: parameters.
        strength: of the sum of `(kurtosis - 1.8)^2` over weights.
    """
    learning = [weight for weight in weights if weight.grad is not None and weight.numel() > 1]
    if not learning:
        return
    with torch.enable_grad():
        leaves = [weight.detach().float().requires_grad_() for weight in learning]
        penalty = strength * torch.stack([(_kurtosis(leaf) - UNIFORM).square() for leaf in leaves]).sum()
        gradients = torch.autograd.grad(penalty, leaves)
    for weight, gradient in zip(learning, gradients, strict=True):
        if weight.grad is not None and bool(gradient.isfinite().all()):
            weight.grad.add_(gradient.to(weight.grad))


def _kurtosis(values: Tensor) -> Tensor:
    """Return the fourth moment over the squared second one, 0-dim."""
    centred = values - values.mean()
    return centred.pow(4).mean() / centred.square().mean().square()
