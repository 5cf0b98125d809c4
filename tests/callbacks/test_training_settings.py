from typing import Any

import pytest

from lightning_quant.callbacks.training_settings import TrainingSettings
from lightning_quant.errors import QuantizationError
from lightning_quant.report.limits import NO_LIMITS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only_if_needed": {"size_ratio": 0.5}}, "limits on metrics alone"),
        ({"only_if_needed": {"max_accuracy_drop": 0.1}}, "limits on metrics alone"),
        ({"only_if_needed": {"val_acc": -0.1}, "evaluate": False}, "evaluate=False"),
        ({"only_if_needed": -0.1}, "`only_if_needed` to be limits on metrics alone"),
        ({"only_if_needed": True}, "`only_if_needed` to be limits on metrics alone"),
        ({"recipe": "int8_dynamic"}, "one for training"),
    ],
)
def test_what_no_training_can_do_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        TrainingSettings(**arguments)


def test_limits_are_read_as_everywhere() -> None:
    assert TrainingSettings().only_if_needed == NO_LIMITS
    limits = TrainingSettings(only_if_needed={"val_acc": -0.01, "val_loss": 0.1}).only_if_needed  # type: ignore[arg-type]
    assert limits.max_drop == {"val_acc": 0.01, "val_loss": 0.1}
    assert (limits.higher_is_better, limits.lower_is_better) == (["val_acc"], ["val_loss"])
