"""In-place operations become ordinary ones of the same meaning."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from prepared_graphs import ready
from torch import Tensor, nn

from lightning_quant.export.convert import convert
from lightning_quant.numerics.noise import signal_to_noise

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class InPlace(nn.Module):
    """Two convolutions and an in-place operation between them, given as a function."""

    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.middle(self, self.conv1(x)))


def unused_result(net: nn.Module, x: Tensor) -> Tensor:
    x.add_(net.conv2(x))
    return x


def earlier_reader(net: nn.Module, x: Tensor) -> Tensor:
    total = x + x
    net.relu(x)
    return total + x


def later_reader(net: nn.Module, x: Tensor) -> Tensor:
    y = F.relu_(x)
    return net.conv2(y) + x


def augmented(net: nn.Module, x: Tensor) -> Tensor:
    y = x
    y += net.conv2(x)
    y *= 0.5
    return x + y


def clamped(net: nn.Module, x: Tensor) -> Tensor:
    x.clamp_(-0.3, 0.4)
    return x


def into_a_view(net: nn.Module, x: Tensor) -> Tensor:
    x[:, :2].mul_(3.0)
    return x


def by_index(net: nn.Module, x: Tensor) -> Tensor:
    x[:, 1] = 0.7
    return x


MIDDLES = [unused_result, earlier_reader, later_reader, augmented, clamped]


@pytest.mark.parametrize("middle", [*MIDDLES, into_a_view, by_index], ids=lambda middle: middle.__name__)
def test_in_place_operations_mean_what_they_mean_in_the_float_model(middle: Callable[..., Tensor]) -> None:
    model = InPlace(middle).eval()
    prepared = ready(model, IMAGE)
    with torch.no_grad():
        expected = model(IMAGE.clone())
        with prepared.attached("observe"):
            torch.testing.assert_close(model(IMAGE), expected, atol=0, rtol=0)
        with prepared.attached("frozen"):
            simulated = model(IMAGE)
    assert signal_to_noise(expected, simulated) > 25
    assert signal_to_noise(expected, convert(prepared)(IMAGE)) > 25
    assert prepared.plan.coverage == 1.0


@pytest.mark.parametrize("middle", [unused_result, clamped], ids=lambda middle: middle.__name__)
def test_in_place_operations_left_as_they_are_get_lost(
    middle: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_quant.graph.trace.functionalize", lambda graph, root: None)
    model = InPlace(middle).eval()
    prepared = ready(model, IMAGE)
    with torch.no_grad():
        assert signal_to_noise(model(IMAGE), convert(prepared)(IMAGE)) < 25
