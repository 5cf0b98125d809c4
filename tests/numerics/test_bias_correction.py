"""The mean of each channel's output stays what it was before weights were rounded."""

import torch
import torch.nn.functional as F  # noqa: N812

from lightning_quant.numerics.bias_correction import InputMeans, bias_correction, mean_shift
from lightning_quant.numerics.folding import Statistics, fold


def test_means_of_inputs_are_those_of_all_calls_together() -> None:
    images, rows = torch.randn(10, 3, 4, 4) + 1, torch.randn(10, 5) - 2
    means = InputMeans()
    for part in (slice(0, 2), slice(2, 2), slice(2, 10)):
        means.update("conv", "conv2d", images[part])
        means.update("linear", "linear", rows[part])

    torch.testing.assert_close(means.means["conv"], images.double().mean((0, 2, 3)))
    torch.testing.assert_close(means.means["linear"], rows.double().mean(0))
    assert means.counts == {"conv": 160, "linear": 10}


def test_rounding_a_folded_weight_shifts_no_mean() -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(4, 6), torch.rand(500, 6) + 1
    norm = Statistics(torch.randn(4), torch.rand(4) + 0.5, torch.randn(4), torch.randn(4), 1e-5)
    folded = fold(weight, None, norm, torch.tensor(0.02), 7)
    integers = folded.integers(weight, 7)
    exact = F.linear(x, weight * folded.gain.view(-1, 1)).mean(0)
    rounded = F.linear(x, integers * folded.scale.view(-1, 1)).mean(0)
    shift = bias_correction(weight, folded, integers, x.double().mean(0))

    assert float((rounded - exact).abs().max()) > 0.05
    torch.testing.assert_close(rounded + shift, exact, atol=1e-4, rtol=1e-4)


def test_groups_see_the_means_of_their_own_channels() -> None:
    error = torch.tensor([[1.0], [2.0]]).view(2, 1, 1)
    assert mean_shift(error.expand(2, 1, 3), torch.tensor([5.0, 7.0])).tolist() == [-15.0, -42.0]
