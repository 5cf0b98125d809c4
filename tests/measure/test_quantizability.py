"""Numbers of a tensor on its grid agree with rounding it, and see an outlier that the noise of the whole does not."""

import pytest
import torch

from lightning_quant.measure.quantizability import clipped_share, input_numbers, weight_numbers


@pytest.mark.parametrize("bits", [4, 8])
def test_noise_is_that_of_rounding(bits: int) -> None:
    x = torch.randn(64, 16, 5, generator=torch.Generator().manual_seed(0))
    step = (x.max() - x.min()) / (2**bits - 1)
    error = (x / step).round() * step - x
    expected = 10 * torch.log10(x.square().mean() / error.square().mean())
    assert input_numbers(x, 1, bits).db == pytest.approx(float(expected), abs=0.3)
    weight = x.flatten(1)
    steps = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    error = (weight / steps).round() * steps - weight
    expected = 10 * torch.log10(weight.square().mean() / error.square().mean())
    assert weight_numbers(weight, 0, bits).db == pytest.approx(float(expected), abs=1.0)


def test_outlier_channel_is_seen_and_named() -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    before = input_numbers(x, -1)
    x[:, 5] *= 1000
    after = input_numbers(x, -1)
    assert before.db > 35 > 0 > after.db
    assert (after.channel, after.spread > 300) == (5, True)
    rows = weight_numbers(x.T.contiguous(), 0)
    # A scale for each channel takes it.
    assert rows.db > 35
    assert rows.channel == 5


def test_kurtosis_and_clipped_share() -> None:
    flat = torch.linspace(-1, 1, 10_001).view(1, -1)
    assert weight_numbers(flat).kurtosis == pytest.approx(1.8, abs=0.01)
    assert clipped_share(flat, -0.5, 1.0) == pytest.approx(0.25, abs=0.001)


def test_tensors_of_zeros_are_no_trouble() -> None:
    assert weight_numbers(torch.zeros(3, 4)).spread == 1.0
    assert input_numbers(torch.zeros(3, 4), 1).db == float("inf")
