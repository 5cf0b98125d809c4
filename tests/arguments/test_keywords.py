import inspect
from typing import Any

import pytest

import lightning_quant as lq
from lightning_quant.arguments.keywords import known_arguments
from lightning_quant.errors import QuantizationError


@pytest.mark.parametrize(
    ("door", "name", "meant"),
    [
        (lq.QuantizationAwareTraining, "scheduel", "'schedule'"),
        (lq.PostTrainingQuantization, "output", "'output_dir'"),
        (lq.PostTrainingQuantization, "num_batches", "'calibration'"),
        (lq.quantize, "calib_dataloader", "'calibration_data'"),
        (lq.quantize, "backend", "'runtime'"),
        (lq.quantize, "batch", "It has model_or_checkpoint, recipe, "),
        (lq.Schedule, "fake_quant", "'fake_quantize'"),
        (lq.Recipe, "weights", "'weight'"),
        (lq.QuantizationMonitor, "regularise", "'regularize'"),
    ],
)
def test_an_unknown_argument_is_answered_with_the_one_that_was_meant(door: Any, name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"\(\) has no argument '{name}'\..*({meant})") as caught:
        door(**{name: 1})
    assert isinstance(caught.value, QuantizationError)


def test_what_is_asked_of_a_door_is_as_before() -> None:
    def door(first: int, *, second: str = "x") -> str:
        """Say it."""
        return second * first

    checked = known_arguments(door)
    assert inspect.signature(checked) == inspect.signature(door)
    assert (checked.__doc__, checked.__name__) == ("Say it.", "door")
    assert checked(2, second="y") == checked(first=2, second="y") == "yy"
