"""A wrong name is answered with the one that was meant."""

from typing import Any

import pytest
import torch

from lightning_quant.arguments.choice import check_choice, closest
from lightning_quant.errors import QuantizationError


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Int8 Weight Only", ["int8_weight_only"]),
        ("int8_wieght_only", ["int8_weight_only"]),
        ("mean_squared", []),
        ("", []),
        (8, []),
        ("w8a8", ["int8"]),
    ],
)
def test_only_what_comes_close_is_offered(written: Any, meant: list[str]) -> None:
    assert closest(written, ["int8", "int8_weight_only", "float16"])[:1] == meant


@pytest.mark.parametrize(("dtype", "meant"), [(torch.qint8, "int8"), (torch.float16, "float16")])
def test_a_type_of_pytorchs_is_told_by_its_name(dtype: torch.dtype, meant: str) -> None:
    with pytest.raises(QuantizationError, match=rf"but got {dtype}\. Did you mean '{meant}'"):
        check_choice("recipe", dtype, ["int8", "float16"])
