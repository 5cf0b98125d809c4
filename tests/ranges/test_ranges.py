"""What runs see counts for ranges."""

import torch
from residual_nets import LARGE, observing_residual
from torch import Tensor


def test_a_run_rounds_to_the_ranges_of_the_runs_before() -> None:
    model, prepared = observing_residual()
    prepared.set_phase("fake_quantize")
    with torch.no_grad():
        model(LARGE)
        scales = prepared.ranges.grids().scales
        for _ in range(2):
            model(100 * LARGE)
            seen, prepared.observing = scales, False
            model(LARGE)
            prepared.observing, scales = True, prepared.ranges.grids().scales
            assert bool((scales > seen).any())


def test_every_run_counts_once_for_every_edge() -> None:
    model, prepared = observing_residual()
    for phase in ("observe", "fake_quantize", "fake_quantize"):
        prepared.set_phase(phase)
        model(LARGE)

    assert {observer.num_updates for observer in prepared.ranges.observers.values()} == {3}


def test_a_first_run_under_rounding_has_the_ranges_that_it_sees() -> None:
    model, prepared = observing_residual()
    prepared.set_phase("fake_quantize")
    first = model(LARGE)
    plain, other = observing_residual()
    other.set_phase("observe")
    plain(LARGE)
    # BatchNorm has moved on in the first run.
    plain.load_state_dict(observing_residual()[0].state_dict())
    other.set_phase("fake_quantize")
    other.observing = False

    assert decibels(plain(LARGE).detach(), first.detach()) > 20


def decibels(signal: Tensor, noisy: Tensor) -> float:
    return float(10 * torch.log10(signal.square().sum() / (noisy - signal).square().sum().clamp(min=1e-20)))
