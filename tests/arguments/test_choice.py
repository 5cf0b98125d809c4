"""A wrong name is answered with the one that was meant."""

from typing import Any

import pytest

from lightning_quant.arguments.choice import closest


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Int8 Weight Only", ["int8_weight_only"]),
        ("int8_wieght_only", ["int8_weight_only"]),
        ("mean_squared", []),
        ("", []),
        (8, []),
    ],
)
def test_only_what_comes_close_is_offered(written: Any, meant: list[str]) -> None:
    assert closest(written, ["int8", "int8_weight_only", "float16"])[:1] == meant
