"""A call of an artifact fits what was captured, or is refused with what does not."""

import re

import pytest
import torch
from torch import Tensor

from lightning_quant.calls.call_checks import TensorInfo, as_captured, check_named_sizes, difference
from lightning_quant.errors import QuantizationError

FLOATS, INDICES = TensorInfo("x", "float32", ("batch", 3)), TensorInfo("ids", "int64", ("batch",))


def test_values_that_survive_are_taken_in_other_types() -> None:
    x = torch.randn(2, 3)
    assert as_captured(FLOATS, x) is x
    assert as_captured(FLOATS, x.double()).dtype == torch.float32
    assert torch.equal(as_captured(INDICES, torch.tensor([1.0, 2.0])), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("info", "tensor", "message"),
    [
        (INDICES, torch.tensor([1.5, 2.0]), "`ids` to be int64, but got float32 with values that int64 does not have"),
        (FLOATS, torch.zeros(2, 3, dtype=torch.complex64), "its imaginary part would be lost"),
        (FLOATS, torch.zeros(2, 4), "`x` to have shape ('batch', 3), but got (2, 4)"),
        (FLOATS, torch.zeros(3), "but got (3,)"),
        (FLOATS, torch.zeros(2, 3).to_sparse(), "a dense tensor of float32, but got a sparse one"),
        (FLOATS, torch.zeros(2, 3, device="meta"), "but got a meta one"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_others_are_refused(info: TensorInfo, tensor: Tensor, message: str) -> None:
    with pytest.raises(QuantizationError, match=re.escape(message)):
        as_captured(info, tensor)


def test_sizes_of_one_name_are_one_size() -> None:
    check_named_sizes((FLOATS, INDICES), [torch.zeros(2, 3), torch.zeros(2)])
    with pytest.raises(QuantizationError, match=r"`x` and `ids` to have one size along 'batch'.*but got 2 and 1"):
        check_named_sizes((FLOATS, INDICES), [torch.zeros(2, 3), torch.zeros(1)])


def test_constants_that_differ_are_named() -> None:
    assert difference([1, "a"], {"number": 1, "text": "b"}) == "text='a', but got text='b'"
    assert difference([1], {"number": 1, "text": "b"}) == "[1], but got {'number': 1, 'text': 'b'}"
