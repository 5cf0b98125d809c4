"""What passes through each quantized tensor, as a whole and channel by channel."""

import torch
from prepared_graphs import evaluated
from torch import nn

from lightning_quant.calls.calls import Call
from lightning_quant.measure.edge_statistics import edge_statistics


def test_statistics_are_those_of_all_calls_and_count_what_the_grid_clips() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(64, 6)
    prepared = evaluated(model, x)
    calls = [Call((part,)) for part in (3 * x).split(16)]
    with torch.no_grad():
        hidden = model[:2](3 * x)
    seen = edge_statistics(prepared, calls)
    wide = seen[":1"]
    scale, zero_point = prepared.ranges.parameters(":1")
    rounded = (torch.round(hidden / scale) + zero_point).clamp(0, 255)

    torch.testing.assert_close(wide.high, hidden.amax(0))
    torch.testing.assert_close(wide.mean.float(), hidden.mean(0))
    assert wide.number == hidden.numel()
    assert wide.outside == int((torch.round(hidden / scale) + zero_point > 255).sum()) > 0
    torch.testing.assert_close(
        wide.noise, float(((rounded - zero_point) * scale - hidden).square().sum()), rtol=1e-4, atol=0
    )
    assert not prepared.is_attached


def test_channels_that_never_fire_count_for_no_spread() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(2, 3, bias=False), nn.Linear(3, 1)
            self.layer.weight.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 4.0]])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.layer(x)))

    x = torch.ones(4, 2)
    prepared = evaluated(Dead(), x)
    assert edge_statistics(prepared, [Call((x,))])[":relu"].spread == 4.0
