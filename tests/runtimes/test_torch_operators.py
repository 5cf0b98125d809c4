"""Programs call a closed list of operators."""

import pytest
import torch

from lightning_quant.runtimes import _torch_operators, _torch_program
from lightning_quant.runtimes._torch_operators import name_of, operator_of


def test_the_list_has_no_operator_that_acts() -> None:
    for name in _torch_operators._ATEN:
        packet = getattr(torch.ops.aten, name)
        schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
        assert any(not schema.is_mutable for schema in schemas), name
        pure = [str(schema) for schema in schemas if not schema.is_mutable]
        assert not any(word in text for text in pure for word in ("Storage", "Stream")), name
    strange = {"from_file", "save", "set_", "resize_", "_print", "empty", "empty_like", "new_empty", "empty_strided"}
    assert not strange & _torch_operators._ATEN
    assert all(isinstance(value, torch.dtype | torch.memory_format | torch.layout)
               for value in _torch_program.CONSTANTS.values())  # fmt: skip


def test_operators_of_the_list_are_found_by_their_names_and_no_others() -> None:
    name = name_of(torch.ops.aten.relu.default)
    assert name == "aten.relu.default"
    assert operator_of(name) is torch.ops.aten.relu.default
    assert name_of(torch.ops.aten.from_file.default) is None
    for other in ("aten.from_file.default", "os.system", "aten.add.out", 7):
        with pytest.raises((LookupError, TypeError, ValueError, AttributeError)):
            operator_of(other)
