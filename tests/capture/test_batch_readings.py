"""How a batch becomes a call of a forward: the one way in which it runs."""

import inspect

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.calls.calls import Call
from lightning_quant.capture.batch_readings import choose_reading, run_call, way_out
from lightning_quant.errors import CalibrationError, CaptureError

X, Y = torch.randn(4, 3), torch.arange(4)


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        return self.layer(x)


class Two(One):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.layer(x) if other is None else self.layer(x) + other[:, None]


def reading_of(module: nn.Module, item: object, *, is_batch: bool = True) -> tuple[Call, str]:
    reading = choose_reading(module, inspect.signature(module.forward), item, is_batch=is_batch)
    return reading.call(item), reading.left_out


def test_labels_are_left_out_and_what_was_left_out_is_said() -> None:
    call, left_out = reading_of(One(), (X, Y))
    assert (call.args, call.kwargs) == ((X,), {})
    assert left_out.startswith("a tensor of shape (4,): `forward(")
    call, left_out = reading_of(One(), {"x": X, "label": Y})
    assert (call.args, call.kwargs) == ((), {"x": X})
    assert "'label': no argument of" in left_out
    call, left_out = reading_of(One(), X)
    assert (call.args, left_out) == ((X,), "")


def test_what_runs_in_two_ways_is_refused_unless_it_is_written_as_a_call() -> None:
    with pytest.raises(CalibrationError, match=r"clear which items of a batch .* runs with 1 as with 2 of the 2"):
        reading_of(Two(), (X, Y))
    call, _ = reading_of(Two(), (X, Y), is_batch=False)
    assert call.args == (X, Y)


def test_what_fits_no_argument_or_fails_is_refused_with_what_to_write() -> None:
    with pytest.raises(CaptureError, match=r"fits `forward\(.*Each item of `calibration_data` is one call"):
        reading_of(One(), {"flag": True}, is_batch=False)
    with pytest.raises(CalibrationError, match=r"the float module fails at the first: RuntimeError"):
        reading_of(One(), (torch.randn(4, 7),))
    assert "(batch['image'],) for batch in loader" in way_out({"label": 3, "image": X})


def test_a_later_call_that_fails_is_named_with_its_sizes() -> None:
    module = One()
    run_call(module, Call((X,)), 0)
    with pytest.raises(CalibrationError, match=r"item 5, of \[\(2, 9\)\], fails: RuntimeError"):
        run_call(module, Call((torch.randn(2, 9),)), 5)
