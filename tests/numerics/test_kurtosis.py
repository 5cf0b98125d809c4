"""The penalty on weights that are not flat has the gradient of its definition, and flattens."""

import torch
from torch import nn

from lightning_quant.numerics.kurtosis import add_kurtosis_gradient


def kurtosis(weight: torch.Tensor) -> torch.Tensor:
    return ((weight - weight.mean()) ** 4).mean() / weight.var(correction=0) ** 2


def test_gradient_is_that_of_the_definition_and_is_added() -> None:
    torch.manual_seed(0)
    weight, unused = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(3))
    weight.grad = torch.ones(4, 5)
    add_kurtosis_gradient([weight, unused], 0.3)
    leaf = weight.detach().clone().requires_grad_()
    (0.3 * (kurtosis(leaf) - 1.8) ** 2).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(weight.grad, 1 + leaf.grad)
    assert unused.grad is None


def test_constant_weights_are_left_alone() -> None:
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    add_kurtosis_gradient([weight], 1.0)
    assert torch.equal(weight.grad, torch.ones(4))
