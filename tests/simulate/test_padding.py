"""Places that a mask hides take no part in ranges, whatever stands there."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage.*:UserWarning"),
]
LENGTHS = torch.tensor([7, 3, 5, 2])
HIDDEN = torch.arange(7)[None] >= LENGTHS[:, None]


class Encoder(nn.Module):
    """An encoder that pools what is not hidden; the mask is true where a place counts, if it keeps, or where not."""

    def __init__(self, *, keeps: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.keeps, self.batch_first = keeps, batch_first
        self.lift = nn.Linear(8, 32)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first), 1)
        self.label = nn.Linear(32, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = mask == (0 if self.keeps else 1)
        if not self.batch_first:
            x = x.transpose(0, 1)
        y = self.body(self.lift(x), src_key_padding_mask=hidden)
        y = y if self.batch_first else y.transpose(0, 1)
        return self.label(y.masked_fill(hidden.unsqueeze(2), 0.0).sum(1) / 7)


def ranges(model: nn.Module, *calls: tuple[Any, ...]) -> Prepared:
    prepared = prepare(model.eval(), calls[0], observer="min_max")
    calibrate(prepared, steps_of(prepared, calls))
    return prepared


def with_padding(value: float) -> Tensor:
    x = torch.randn(4, 7, 8, generator=torch.Generator().manual_seed(0))
    return x.masked_fill(HIDDEN.unsqueeze(2), value)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
def test_hidden_places_do_not_widen_ranges(keeps: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    model = Encoder(keeps=keeps, batch_first=batch_first)
    mask = (~HIDDEN if keeps else HIDDEN).long()
    quiet = ranges(model, (with_padding(0.0), mask))
    loud = ranges(model, (with_padding(100.0), mask))

    for identity, observer in quiet.ranges.observers.items():
        assert torch.allclose(observer.low, loud.ranges.observers[identity].low, atol=1e-4), identity
        assert torch.allclose(observer.high, loud.ranges.observers[identity].high, atol=1e-4), identity
    x = with_padding(100.0)
    with torch.no_grad(), evaluation_mode(model):
        expected = model(x, mask)
        with loud.attached("frozen"):
            actual = model(x, mask)
    assert signal_to_noise(expected, actual) > 25


class Flagged(nn.Module):
    """A flag for each place that is no mask: all places count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)) + mask.unsqueeze(2)).mean(1)


def test_a_flag_that_hides_nothing_is_no_mask() -> None:
    prepared = ranges(Flagged(), (with_padding(100.0), HIDDEN.long()))
    assert max(observer.high.item() for observer in prepared.ranges.observers.values()) > 20
