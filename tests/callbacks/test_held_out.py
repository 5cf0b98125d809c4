"""Float and artifact are compared on a call that chose nothing, where there is one, and the report says which it is."""

from pathlib import Path
from typing import Any

import pytest
from lightning_models import BATCH, NUM_BATCHES, NUM_TRAIN, NUM_VALIDATION, Classifier, fit

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.callbacks import held_out as module

VALIDATION, TRAINING = "a call of validation, which chose no range", "a training batch that took no part in calibration"
CAPTURED = "the captured call, which took part in the choice of ranges"
FIRST = "the first call of validation, which"
ALL = NUM_VALIDATION // BATCH


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("kind", "options", "trainer", "base"),
    [
        (PostTrainingQuantization, {}, {}, f"{FIRST} chose no range"),
        (PostTrainingQuantization, {"evaluate": False}, {}, VALIDATION),
        (QuantizationAwareTraining, {"evaluate": False}, {}, VALIDATION),
        (PostTrainingQuantization, {"calibration": {"num_batches": 1, "data": "validation"}}, {}, VALIDATION),
        (
            PostTrainingQuantization,
            {"calibration": {"num_batches": ALL, "data": "validation"}},
            {},
            f"{FIRST} took part in calibration",
        ),
        (PostTrainingQuantization, {"calibration": {"num_batches": 2}}, {"limit_val_batches": 0}, TRAINING),
        (PostTrainingQuantization, {"calibration": {"num_batches": NUM_BATCHES}}, {"limit_val_batches": 0}, CAPTURED),
        (QuantizationAwareTraining, {}, {"limit_val_batches": 0}, CAPTURED),
    ],
)
def test_the_call_that_is_compared(kind: Any, options: Any, trainer: Any, base: str, tmp_path: Path) -> None:
    callback = kind(output_dir=tmp_path, **options)
    fit(Classifier(), callback, max_epochs=1, **trainer)
    assert NUM_TRAIN == NUM_BATCHES * BATCH
    assert callback.artifact.report["noise"]["base"] == base


@pytest.mark.usefixtures("unmeasured")
def test_a_step_that_fails_when_it_is_run_once_more_costs_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("not outside of a loop")

    monkeypatch.setattr(module, "run_validation", fail)
    monkeypatch.setattr(module, "run_training_step", fail)
    callback = PostTrainingQuantization(output_dir=tmp_path, evaluate=False, calibration={"num_batches": 1})
    fit(Classifier(), callback, max_epochs=1)
    assert callback.artifact is not None
    assert callback.artifact.report is not None
    assert callback.artifact.report["noise"]["base"] == CAPTURED
