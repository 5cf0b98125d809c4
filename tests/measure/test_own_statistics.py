"""What quantizing each operator does where it is."""

import math

import pytest
import torch
from prepared_graphs import evaluated
from torch import nn

from lightning_quant.calls.calls import Call
from lightning_quant.measure.own_statistics import error_of, own_statistics


def test_an_operator_is_known_by_its_own_noise_range_and_channels() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(64, 6)
    with torch.no_grad():
        model[0].weight[1] *= 50
    prepared = evaluated(model, x)
    first, last = own_statistics(prepared, [Call((x,))]).values()

    assert first["low"] == 0
    assert first["high"] == pytest.approx(float(model[:2](x).detach().max()), rel=0.02)
    assert first["clipped"] == 0
    assert first["widest"] > 10 > 3 > last["widest"]
    assert 20 < first["own_db"] < 60
    assert (first["float_bytes"], last["float_bytes"]) == (3 * 24 - 13 * 4, 3 * 8 - 13 * 2)


def test_errors_are_noise_over_signal() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert error_of([exact], [exact + torch.tensor([0.3, 0.4])]) == pytest.approx(0.01)
    assert error_of([exact], [exact]) == 0
    assert math.isfinite(error_of([exact], [-exact]))
