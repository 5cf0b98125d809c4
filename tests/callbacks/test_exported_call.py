"""Which of the calls that a run makes of its module is the one exported."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_quant.callbacks import exported_call as calls
from lightning_quant.callbacks.exported_call import exported_call
from lightning_quant.capture.capture import Capture
from lightning_quant.doors.settings import CallbackSettings
from lightning_quant.errors import CaptureError

X = torch.ones(2, 4)


class Net(nn.Module):
    def forward(self, x: Tensor, stage: str = "fit") -> Tensor:
        return x


class Task(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()


TRAINING, VALIDATION, PREDICT = (Capture("net", (X,), {"stage": s}) for s in ("fit", "validate", "predict"))
ALIKE = Capture("net", (2 * X,), {"stage": "fit"})


def chosen(monkeypatch: pytest.MonkeyPatch, found: Capture = TRAINING, fills: bool = False, **given: Any) -> Any:
    """Choose among calls that are known."""
    evaluated, predicted = given.pop("evaluated", None), given.pop("predicted", None)
    monkeypatch.setattr(calls, "evaluation_call", lambda *_: evaluated)
    monkeypatch.setattr(calls, "prediction_call", lambda *_: predicted)
    monkeypatch.setattr(calls, "required_prediction", lambda *_: predicted)
    trainer: Any = None
    return exported_call(trainer, Task(), CallbackSettings(**given), found, fills=fills)


@pytest.mark.parametrize("evaluated", [None, ALIKE])
def test_training_is_exported_where_validation_calls_alike(evaluated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = chosen(monkeypatch, evaluated=evaluated)
    assert (result.capture, result.evaluated) == (TRAINING, evaluated)
    assert (result.otherwise, result.findings) == (False, ())


def test_validation_is_exported_where_it_calls_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    result = chosen(monkeypatch, evaluated=VALIDATION)
    assert result.capture is result.evaluated is VALIDATION
    assert result.otherwise
    (finding,) = result.findings
    assert finding.startswith("validation calls 'net' otherwise: `stage` is 'validate' where training has 'fit'.")


def test_another_call_of_predict_is_only_said(monkeypatch: pytest.MonkeyPatch) -> None:
    result = chosen(monkeypatch, evaluated=ALIKE, predicted=PREDICT)
    assert (result.capture, result.otherwise) == (TRAINING, False)
    assert "`stage` is 'predict' where the exported call has 'fit'" in result.findings[0]


def test_predict_is_exported_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"evaluated": VALIDATION, "predicted": PREDICT, "example": "predict_batch"}
    with pytest.raises(CaptureError, match=r"`stage` is 'validate' where predict has 'predict'.*`evaluate=False`"):
        chosen(monkeypatch, **asked)
    for way_out in ({"fills": True}, {"evaluate": False}):
        result = chosen(monkeypatch, **asked, **way_out)
        assert (result.capture, result.evaluated, result.otherwise) == (PREDICT, VALIDATION, True)
        assert result.findings[0].startswith("predict calls 'net' otherwise")


def test_an_example_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    result = chosen(monkeypatch, evaluated=VALIDATION, predicted=PREDICT, example="example_input_array")
    assert (result.capture, result.evaluated, result.findings) == (TRAINING, None, ())
