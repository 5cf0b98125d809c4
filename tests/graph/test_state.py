"""Modules whose answer follows what they have changed in themselves are refused; others may change what they like."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.errors import CaptureError, ExportError
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.export.prepare import prepare
from lightning_quant.planned.layerwise import quantize_layers

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.number, self.kept = 0, {"last": None}

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.touched(self.first(x).relu()))

    def touched(self, h: Tensor) -> Tensor:
        return h


class Counts(Net):
    def touched(self, h: Tensor) -> Tensor:
        self.seen += 1
        return h + 0.001 * self.seen


class CountsInPython(Net):
    def touched(self, h: Tensor) -> Tensor:
        self.number += 1
        return h * self.number


class Averages(Net):
    def touched(self, h: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * h.mean()
        return h - self.seen


class CountsUnread(Net):
    def touched(self, h: Tensor) -> Tensor:
        self.seen += 1
        self.number += 1
        self.last_h = h
        return h


class ComputesOnce(Net):
    def touched(self, h: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.table = torch.linspace(0, 1, h.shape[-1])
        return h * self.table


class CountsInTraining(Net):
    def touched(self, h: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return h + self.seen


@pytest.mark.parametrize("kind", [Counts, CountsInPython, Averages])
def test_an_answer_that_follows_earlier_calls_is_refused_by_name(kind: Any) -> None:
    with pytest.raises(CaptureError, match=r"(?s)changes '(seen|number)', and answers otherwise.*self.training"):
        prepare(kind().eval(), (X,))


@pytest.mark.parametrize("kind", [Counts, CountsInPython, Averages])
def test_stored_layers_of_such_a_module_run_in_its_own_code_alone(kind: Any) -> None:
    with pytest.raises(ExportError, match=r"(?s)changes '(seen|number)', and answers otherwise.*self.training"):
        quantize_layers(kind().eval(), (X,), recipe="int8_weight_only", runtime="onnxruntime")
    filled = quantize_layers(kind().eval(), (X,), recipe="int8_weight_only", runtime="torch")
    assert "answers otherwise" in filled.into_only


@pytest.mark.parametrize("kind", [Net, CountsUnread, ComputesOnce, CountsInTraining])
def test_what_no_answer_depends_on_may_change(kind: Any) -> None:
    assert quantize_layers(kind().eval(), (X,), recipe="int8_weight_only", runtime="torch").into_only == ""
    rows = prepare(kind().eval(), (X,), trains=False).plan.rows
    assert {row.name.partition(".")[0] for row in rows if row.action == "int8"} == {"first", "last"}


class Differentiates(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(super().forward(x).sum(), x)[0]


def test_gradients_that_a_forward_takes_through_integers_are_refused() -> None:
    prepared = prepare(Differentiates().eval(), (X,), trains=False)
    calibrate(prepared, steps_of(prepared, [X]))
    with pytest.raises(ExportError, match=r"integer layers, but .*gradients.*exclude"):
        check_agreement(prepared, convert(prepared), (X,), {})
