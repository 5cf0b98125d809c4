"""Ranges are learned from calls of the module in evaluation mode."""

import pytest
import torch
from models import ResidualNet, with_statistics
from torch import nn

from lightning_quant.calibrate.calibrate import as_call, calibrate, steps_of
from lightning_quant.calls.calls import Call
from lightning_quant.errors import CalibrationError
from lightning_quant.export.prepare import prepare

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def test_an_item_is_one_call_in_whatever_form_it_is_written() -> None:
    assert as_call(X) == Call((X,))
    assert as_call((X, 3)) == as_call([X, 3]) == Call((X, 3))
    assert as_call({"x": X}) == Call((), {"x": X})
    call = Call((X,), {"flag": True})
    assert as_call(call) is call


def test_ranges_are_those_of_all_calls_and_the_module_trains_on_as_before() -> None:
    torch.manual_seed(0)
    model = with_statistics(ResidualNet()).train()
    images = torch.randn(12, 3, 8, 8)
    statistics = model.state_dict()
    before = {name: tensor.clone() for name, tensor in statistics.items()}
    prepared = prepare(model, (images[:4],), observer="min_max")

    assert calibrate(prepared, steps_of(prepared, images.split(4))) == 3
    low, high = next(iter(prepared.ranges.observers.values())).range()
    assert (low, high) == (images.min(), images.max())
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_step_is_refused() -> None:
    prepared = prepare(nn.Sequential(nn.Linear(6, 4)).eval(), (X,), observer="min_max")
    with pytest.raises(CalibrationError, match="at least one batch, but it yielded none"):
        calibrate(prepared, [])


def test_what_no_call_reaches_is_refused_or_has_the_range_of_the_captured_one() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    prepared = prepare(model, (X,), observer="min_max")
    with pytest.raises(CalibrationError, match=":input was not"):
        calibrate(prepared, [lambda: None])

    prepared.learns_from_captured = True
    calibrate(prepared, [lambda: None])
    assert prepared.ranges.observers[":input"].range() == (X.min(), X.max())
