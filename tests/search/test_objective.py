from typing import Any

import pytest

from lightning_quant.errors import QuantizationError
from lightning_quant.search.objective import check_search


@pytest.mark.parametrize(
    "arguments", [(None, None, None), ("size", 1, 0.5), ("latency", None, 3), ("val_acc", 9, None)]
)
def test_what_a_search_can_do_is_taken(arguments: tuple[Any, ...]) -> None:
    check_search(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", None, None), "`objective` to be 'size'"),
        ((True, None, None), "`objective` to be 'size'"),
        (("Latency", None, None), "'latency' was probably meant"),
        (("size", 0, None), "`max_validations`"),
        (("size", True, None), "`max_validations`"),
        (("size", None, float("nan")), "`time_budget_s`"),
        (("size", None, True), "`time_budget_s`"),
        (("size", None, "60"), "`time_budget_s`"),
    ],
)
def test_what_no_search_can_do_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        check_search(*arguments)
