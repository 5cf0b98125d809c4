"""How far two results are apart."""

import pytest
import torch

from lightning_quant.numerics.noise import signal_to_noise, unequal_integers


def test_signal_to_noise_is_its_definition() -> None:
    signal, noise = torch.randn(1000, dtype=torch.float64), torch.randn(1000, dtype=torch.float64)
    expected = 10 * torch.log10(signal.square().mean() / (0.01 * noise).square().mean())
    assert signal_to_noise(signal, signal + 0.01 * noise) == pytest.approx(expected.item())
    assert signal_to_noise({"a": signal}, {"a": signal}) == float("inf")
    damaged = signal.clone()
    damaged[0] = float("nan")
    assert not signal_to_noise(signal, damaged) >= 0
    assert signal_to_noise((signal, torch.tensor(1)), (signal, torch.tensor(2))) == float("inf")


def test_share_of_integers_that_differ() -> None:
    first = (torch.tensor([1, 2, 3]), torch.tensor([True]), torch.rand(2), torch.zeros(2, dtype=torch.long))
    other = (torch.tensor([1, 2, 4]), torch.tensor([False]), torch.rand(2), torch.zeros(3, dtype=torch.long))

    assert unequal_integers(first, other) == 0.5
    assert unequal_integers(first[2:3], other[2:3]) is None
