"""Factors and shifts of channels behind a layer fold into it, whatever they are written as."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import with_statistics
from prepared_graphs import evaluated, quantized_layers
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(0))


class Stepped(nn.Module):
    """A layer with steps behind it, which read parameters and buffers of theirs, and a layer behind those."""

    def __init__(self, layer: nn.Module, steps: Callable[..., Tensor], last: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.steps, self.last = layer, steps, last
        self.gain, self.shift = nn.Parameter(torch.rand(shape) + 0.5), nn.Parameter(torch.randn(shape))
        self.register_buffer("mean", torch.randn(shape) / 5)
        self.register_buffer("variance", torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.steps(self, self.layer(x))))


def frozen_norm(net: Any, x: Tensor) -> Tensor:
    scale = net.gain * (net.variance + 1e-5).rsqrt()
    return x * scale + (net.shift - net.mean * scale)


STEPS: dict[str, Callable[..., Tensor]] = {
    "frozen norm": frozen_norm,
    "gain": lambda net, x: net.gain * x,
    "shift, then logarithmic gain": lambda net, x: (x + net.shift) * torch.exp(net.gain),
    "normalized": lambda net, x: x.sub(net.mean).div(net.variance.sqrt()),
    "numbers": lambda net, x: x * 0.3 - 0.1,
    "one for all": lambda net, x: torch.add(x * net.gain.mean(), net.shift.mean()),
    "negative": lambda net, x: net.shift + x * -net.gain,
}


def convolution(steps: Callable[..., Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Stepped(nn.Conv2d(3, 6, 3, bias=False), steps, nn.Conv2d(6, 2, 3), (1, 6, 1, 1)).eval()


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_they_are_part_of_a_convolution(steps: Callable[..., Tensor]) -> None:
    model = convolution(steps)
    prepared = evaluated(model, IMAGE)

    assert {row.action for row in prepared.plan.rows if row.kind != "Parameter"} == {"int8", "fused"}
    converted = convert(prepared)
    assert len(quantized_layers(converted)) == 2
    with torch.no_grad(), prepared.attached("frozen"):
        simulated = model(IMAGE)
    with torch.no_grad():
        assert signal_to_noise(simulated, converted(IMAGE)) > 60
        assert 25 < signal_to_noise(model(IMAGE), converted(IMAGE)) < 80


@pytest.mark.parametrize("steps", ["frozen norm", "gain", "numbers"])
def test_they_are_part_of_a_linear_layer(steps: str) -> None:
    torch.manual_seed(0)
    model = Stepped(nn.Linear(6, 8), STEPS[steps], nn.Linear(8, 2), (8,)).eval()
    prepared = evaluated(model, ROWS)

    assert {row.action for row in prepared.plan.rows} == {"int8", "fused"}
    with torch.no_grad():
        assert 25 < signal_to_noise(model(ROWS), convert(prepared)(ROWS)) < 80


OTHERS: dict[str, Callable[..., Tensor]] = {
    "of places": lambda net, x: x + torch.arange(6.0),
    "of the input": lambda net, x: x * x.mean(),
    "taken from a constant": lambda net, x: 1 - x,
    "divides a constant": lambda net, x: net.gain / (x * x + 1),
}


@pytest.mark.parametrize("steps", OTHERS.values(), ids=OTHERS)
def test_other_steps_stay_as_they_are(steps: Callable[..., Tensor]) -> None:
    model = convolution(steps)
    prepared = evaluated(model, IMAGE)

    assert any(row.action == "float" and row.kind != "Parameter" for row in prepared.plan.rows)
    with torch.no_grad():
        assert 20 < signal_to_noise(model(IMAGE), convert(prepared)(IMAGE)) < 80


def test_they_train_behind_rounded_weights_and_fold_as_they_are_then() -> None:
    model = convolution(frozen_norm)
    prepared = prepare(model, (IMAGE,))
    calibrate(prepared, steps_of(prepared, [(IMAGE,)]))
    before = copy.deepcopy(model.state_dict())
    prepared.set_phase("fake_quantize")
    prepared.attach()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IMAGE).square().mean().backward()
        optimizer.step()
    prepared.detach()
    model.eval()

    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())
    prepared.observing = True
    calibrate(prepared, steps_of(prepared, [(IMAGE,)]))
    with torch.no_grad():
        assert 25 < signal_to_noise(model(IMAGE), convert(prepared)(IMAGE)) < 80


def test_they_are_folded_behind_a_norm() -> None:
    model = convolution(STEPS["gain"])
    model.layer = with_statistics(nn.Sequential(model.layer, nn.BatchNorm2d(6))).eval()
    prepared = evaluated(model, IMAGE)

    assert {row.action for row in prepared.plan.rows if row.kind != "Parameter"} == {"int8", "fused"}
    with torch.no_grad():
        assert 25 < signal_to_noise(model(IMAGE), convert(prepared)(IMAGE)) < 80


def test_steps_for_accuracy_know_them() -> None:
    model = convolution(frozen_norm)
    prepared = prepare(model, (IMAGE,), recipe="int8_accurate", trains=False)
    calibrate(prepared, steps_of(prepared, [(IMAGE[:2],), (IMAGE[2:],)]))
    assert check_agreement(prepared, convert(prepared), (IMAGE,), {}) > 60
