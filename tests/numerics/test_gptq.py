"""GPTQ against rounding to nearest, against brute force, and in its special cases."""

import itertools

import pytest
import torch
from torch import Tensor

from lightning_quant.numerics.gptq import Hessian, gptq, inverse_factor, output_error


def correlated(samples: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator)
    return torch.randn(samples, features // 4, generator=generator) @ mixing[: features // 4] + 0.1 * torch.randn(
        samples, features, generator=generator
    )


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_less_output_error_than_rounding_to_nearest(bits: int) -> None:
    inputs, generator = correlated(512, 192), torch.Generator().manual_seed(1)
    weight = torch.randn(24, 192, generator=generator)
    hessian = Hessian(192)
    for part in inputs.split(100):
        hessian.update(part.view(2, -1, 192))
    torch.testing.assert_close(hessian.mean, (inputs.T @ inputs).double() / 512, rtol=1e-5, atol=1e-5)
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1) / top
    integers = gptq(weight, hessian.mean, scale, -top, top)
    nearest = torch.round(weight / scale[:, None]).clamp(-top, top)
    assert int(integers.abs().max()) <= top
    learned = output_error(weight, integers * scale[:, None], hessian.mean)
    rounded = output_error(weight, nearest * scale[:, None], hessian.mean)
    direct = ((weight - nearest * scale[:, None]) @ inputs.T).square().sum(0).mean()
    assert rounded == pytest.approx(float(direct), rel=1e-3)
    assert learned < 0.5 * rounded


def test_covariance_leaves_the_mean_out() -> None:
    inputs = correlated(300, 24, seed=9) + 5
    hessian = Hessian(24)
    for part in inputs.split(70):
        hessian.update(part)
    torch.testing.assert_close(hessian.covariance, torch.cov(inputs.double().T, correction=0), rtol=1e-4, atol=1e-4)


def test_groups_and_zero_points() -> None:
    inputs, generator = correlated(256, 64, seed=2), torch.Generator().manual_seed(3)
    weight = torch.rand(8, 64, generator=generator) + 0.5
    hessian = Hessian(64)
    hessian.update(inputs)
    grouped = weight.view(8, 4, 16)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2)
    scale = (high - low) / 15
    zero = torch.round(-low / scale)
    integers = gptq(weight, hessian.mean, scale, 0, 15, zero_point=zero)
    assert int(integers.min()) >= 0
    assert int(integers.max()) <= 15

    def dequantize(values: Tensor) -> Tensor:
        return ((values.view(8, 4, 16) - zero[..., None]) * scale[..., None]).flatten(1)

    nearest = torch.round(grouped / scale[..., None] + zero[..., None]).clamp(0, 15).flatten(1)
    assert output_error(weight, dequantize(integers), hessian.mean) < output_error(
        weight, dequantize(nearest), hessian.mean
    )


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    scale = weight.abs().amax(1) / 7
    integers = gptq(weight, torch.eye(12, dtype=torch.float64), scale, -7, 7)
    assert torch.equal(integers, torch.round(weight / scale[:, None]).int())


def test_inputs_that_never_fire() -> None:
    inputs = correlated(100, 16, seed=5)
    inputs[:, 3] = 0
    hessian = Hessian(16)
    hessian.update(inputs)
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(6))
    scale = weight.abs().amax(1) / 7
    integers = gptq(weight, hessian.mean, scale, -7, 7)
    assert torch.equal(integers[:, 3], torch.round(weight / scale[:, None]).int()[:, 3])


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-4])
def test_inputs_that_hardly_change(spread: float) -> None:
    inputs = 3.7 + spread * correlated(50, 16, seed=5)
    hessian = Hessian(16)
    for part in inputs.split(10):
        hessian.update(part)
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(6))
    scale = weight.abs().amax(1) / 7
    integers = gptq(weight, hessian.covariance, scale, -7, 7)
    nearest = torch.round(weight / scale[:, None])
    if spread == 0:
        assert torch.equal(integers, nearest.int())
    errors = [output_error(weight, value * scale[:, None], hessian.covariance) for value in (integers, nearest)]
    assert errors[0] <= errors[1]


def test_near_the_best_of_all_roundings() -> None:
    inputs = correlated(64, 8, seed=7)
    hessian = Hessian(8)
    hessian.update(inputs)
    weight = torch.randn(1, 8, generator=torch.Generator().manual_seed(8))
    scale = weight.abs().amax(1) / 3
    low = torch.floor(weight / scale)
    every = [low + torch.tensor([up]) for up in itertools.product((0.0, 1.0), repeat=8)]
    errors = [output_error(weight, value.clamp(-3, 3) * scale, hessian.mean) for value in every]
    found = output_error(weight, gptq(weight, hessian.mean, scale, -3, 3) * scale, hessian.mean)
    nearest = output_error(weight, torch.round(weight / scale) * scale, hessian.mean)
    assert found < nearest
    assert sum(error < found for error in errors) < len(errors) // 8


def test_a_hessian_that_float32_sums_left_indefinite_is_dampened_more() -> None:
    vector = torch.randn(40, 1, dtype=torch.float64)
    hessian = vector @ vector.T - 0.05 * torch.eye(40, dtype=torch.float64) * float(vector.square().mean())
    factor = inverse_factor(torch.stack([hessian, torch.eye(40, dtype=torch.float64)]), 0.01)
    assert torch.isfinite(factor).all()
    torch.testing.assert_close(factor[1].T @ factor[1], torch.eye(40, dtype=torch.float64) / 1.1)
    with pytest.raises(torch.linalg.LinAlgError):
        inverse_factor(torch.full((3, 3), torch.nan, dtype=torch.float64), 0.01)
