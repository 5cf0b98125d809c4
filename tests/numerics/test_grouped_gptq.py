"""Rounding in groups is rounding of each group alone."""

import torch

from lightning_quant.numerics.gptq import gptq
from lightning_quant.numerics.grouped_gptq import GroupedCovariance, grouped_error, grouped_gptq


def inputs(groups: int, number: int, features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(groups, features, features, generator=generator)
    return torch.randn(groups, number, features, generator=generator) @ mixed + 5


def test_the_covariance_is_that_of_all_inputs_together() -> None:
    x = inputs(3, 64, 5)
    covariance = GroupedCovariance()
    for part in (x[:, :10], x[:, 10:11], x[:, 11:]):
        covariance.update(part)
    for group in range(3):
        expected = torch.cov(x[group].double().T, correction=0)
        torch.testing.assert_close(covariance.mean[group], expected, atol=1e-4, rtol=1e-5)


def test_every_group_is_rounded_as_it_is_alone_and_better_than_to_nearest() -> None:
    x = inputs(6, 200, 9)
    weight = torch.randn(6, 2, 9, generator=torch.Generator().manual_seed(1))
    scale = weight.abs().amax(2) / 7
    covariance = GroupedCovariance()
    covariance.update(x)
    integers = grouped_gptq(weight, covariance.mean, scale, 7)
    nearest = torch.round(weight / scale.unsqueeze(2))
    for group in range(6):
        alone = gptq(weight[group], covariance.mean[group], scale[group], -7, 7)
        assert torch.equal(integers[group], alone.float())
    errors = [grouped_error(i * scale.unsqueeze(2) - weight, covariance.mean) for i in (integers, nearest)]
    assert errors[0] < 0.7 * errors[1]
    assert int(integers.abs().max()) <= 7


def test_inputs_that_never_change_are_rounded_to_nearest() -> None:
    covariance = GroupedCovariance()
    covariance.update(torch.full((2, 16, 3), 4.0))
    weight = torch.tensor([[[1.0, -0.6, 0.26]], [[0.2, 0.9, -1.0]]])
    scale = torch.full((2, 1), 0.25)
    assert torch.equal(grouped_gptq(weight, covariance.mean, scale, 7), torch.round(weight / 0.25))
