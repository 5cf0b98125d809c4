"""How far two results are apart."""

import pytest
import torch

from lightning_quant.numerics.noise import sample_ratios, signal_to_noise, unequal_integers


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


def test_each_sample_has_its_ratio() -> None:
    reference = [torch.randn(5, 3, 4), torch.randn(5, 2)]
    other = [x + 0.1 * torch.randn_like(x) for x in reference]
    other[0][2], other[1][2] = reference[0][2], reference[1][2]
    ratios = sample_ratios(reference, other)
    alone = [signal_to_noise([x[i] for x in reference], [x[i] for x in other]) for i in range(5)]
    assert ratios == pytest.approx(alone)
    assert ratios[2] == float("inf")


@pytest.mark.parametrize("sizes", [[(5, 3), (4, 3)], [(1, 3)], [()], [(3, 0)]])
def test_tensors_without_samples_in_common_have_one_ratio(sizes: list[tuple[int, ...]]) -> None:
    reference = [torch.randn(size) for size in sizes]
    other = [x + 0.1 for x in reference]
    assert sample_ratios(reference, other) == [signal_to_noise(reference, other)]
