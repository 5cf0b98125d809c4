"""Noise of outputs in a report: every output that is mostly noise is a warning with what helps."""

import torch

from lightning_quant.calls.calls import Call
from lightning_quant.measure.output_noise import HeldOut, measure_noise
from lightning_quant.report.noise import NoiseSection


class Noisy(torch.nn.Module):
    """Answers noise of a given share beside its input."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.share * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


def section(share: float) -> NoiseSection:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    held = HeldOut((Call((x,)),), "one call")
    return NoiseSection(measure_noise(torch.nn.Identity(), Noisy(share), held), "Keep it float")


def test_what_was_not_measured_says_nothing() -> None:
    empty = NoiseSection(None, "Keep it float")
    assert (empty.text(), empty.warnings(), empty.scalars()) == ("", [], {})


def test_noise_that_no_metric_judges_is_held_against_what_is_usual() -> None:
    clean, usual = section(0.01), section(0.1)
    assert (clean.warnings(), usual.warnings()) == ([], [])
    (text,) = NoiseSection(usual.noise, "Keep it float", 25.0).warnings()
    assert "20." in text or "19." in text
    assert text.endswith("dB from float, where 25 dB or more are usual, and no metric judges it. Keep it float")
    assert NoiseSection(clean.noise, "Keep it float", 25.0).warnings() == []


def test_an_output_that_is_mostly_noise_is_named_with_the_way_out() -> None:
    assert section(0.001).warnings() == []
    loud = section(2.0)
    assert all(text.endswith(". Keep it float") for text in loud.warnings())
    assert loud.warnings()
    assert loud.text()
    assert min(value for value in loud.scalars().values() if value is not None) < 0
