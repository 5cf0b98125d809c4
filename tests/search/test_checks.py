from typing import Any

import pytest
import torch
from torch import nn

from lightning_quant.errors import QuantizationError
from lightning_quant.export.prepare import prepare
from lightning_quant.report.limits import limits_from
from lightning_quant.search.checks import check_metrics, check_size


@pytest.mark.parametrize(
    ("limits", "objective", "message"),
    [
        ({"acc": -0.01}, "size", None),
        ({"loss": 0.01}, "size", None),
        ({"acc": 0.0}, "acc", None),
        ({"acc": 0.01}, "size", "write -, the change in its worse direction"),
        ({"loss": -0.01}, "size", r"write \+, the change"),
        ({"unsaid": 0.0}, "size", "whether unsaid is better"),
        ({"unsaid": -0.1}, "size", None),
        ({"size_ratio": 0.5}, "unsaid", "whether unsaid is better"),
        ({"size_ratio": 0.5}, "los", "`objective` is on los.*'loss' was probably meant"),
        ({"max_drop": {"unsaid": 0.1}}, "size", "whether unsaid is better"),
    ],
)
def test_metrics_are_logged_and_limited_in_their_worse_direction(
    limits: Any, objective: str, message: str | None
) -> None:
    logged, directions = {"acc": 0.9, "loss": 0.1, "unsaid": 3.0}, {"acc": True, "loss": False}
    if message is None:
        check_metrics(limits_from(limits), objective, logged, directions)
        return
    with pytest.raises(QuantizationError, match=message):
        check_metrics(limits_from(limits), objective, logged, directions)


def test_no_file_smaller_than_the_whole_recipe_is_asked_for() -> None:
    model = prepare(nn.Linear(8, 8), (torch.randn(2, 8),), trains=False)
    check_size(limits_from({"size_ratio": 0.5}), model, 144)
    for limits in ({"size_ratio": 0.5}, {"size_bytes": 140}):
        with pytest.raises(QuantizationError, match=r"its smallest file has 150 bytes, 0\.521 of float's 288"):
            check_size(limits_from(limits), model, 150)
