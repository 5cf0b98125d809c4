"""What a forward writes into its module goes on being written, or is refused."""

import copy

import pytest
import torch
from prepared_graphs import ready
from torch import Tensor, nn

from lightning_quant.errors import UntraceableError
from lightning_quant.graph.side_effects import attributes, check_attributes

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Tracking(nn.Module):
    """Keeps a running mean, in place or by assignment, and counts its training steps."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.conv, self.in_place, self.steps = nn.Conv2d(3, 6, 3), in_place, 0
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        if self.training:
            mean = features.detach().mean((0, 2, 3))
            if self.in_place:
                self.mean.mul_(0.9).add_(0.1 * mean)
            else:
                self.mean = 0.9 * self.mean + 0.1 * mean
            self.steps += 1
        return features - self.mean.view(1, -1, 1, 1)


@pytest.mark.parametrize("in_place", [True, False])
def test_buffers_and_counters_written_in_forward_keep_being_written(in_place: bool) -> None:
    torch.manual_seed(1)
    model = Tracking(in_place).eval()
    twin = copy.deepcopy(model).train()
    prepared = ready(model, IMAGE)
    model.train()
    with prepared.attached("observe", observing=True):
        for factor in (1, 2, 3):
            twin(factor * IMAGE)
            model(factor * IMAGE)
    assert twin.mean.abs().sum() > 0
    torch.testing.assert_close(model.mean, twin.mean)
    assert model.steps == twin.steps == 3


def test_a_forward_that_sets_attributes_is_refused_with_the_module() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = attributes(module)
    check_attributes(before, module)
    module[1].last = 3
    with pytest.raises(UntraceableError, match="its forward sets last") as refusal:
        check_attributes(before, module)
    assert refusal.value.places == {"1": "its forward sets last"}
