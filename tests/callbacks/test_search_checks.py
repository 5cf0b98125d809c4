from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import Classifier, fit

from lightning_quant import PostTrainingQuantization
from lightning_quant.callbacks.refusals import check_alone
from lightning_quant.doors.settings import CallbackSettings
from lightning_quant.errors import QuantizationError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]


def test_a_run_without_validation_keeps_no_limit_on_metrics(tmp_path: Path) -> None:
    callback = PostTrainingQuantization(output_dir=tmp_path, limits={"val_accuracy": -0.5})
    with pytest.raises(MisconfigurationException, match="the run has switched validation off"):
        fit(Classifier(), callback, limit_val_batches=0)


def test_looking_at_what_is_logged_leaves_no_trace_in_training(tmp_path: Path) -> None:
    states = []
    for arguments in ({}, {"limits": {"val_accuracy": -1.0}}):
        torch.manual_seed(0)
        model = Classifier()
        fit(model, PostTrainingQuantization(output_dir=tmp_path, **arguments))  # type: ignore[arg-type]
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_search_in_several_processes_is_refused_by_its_settings() -> None:
    searching = CallbackSettings(limits={"val_accuracy": -0.1})  # type: ignore[arg-type]
    with pytest.raises(QuantizationError, match="one process to search"):
        check_alone(searching, 2)
    check_alone(searching, 1)
    check_alone(CallbackSettings(limits={"max_drop": {"val_accuracy": 0.1}}), 2)  # type: ignore[arg-type]
