"""What exporters refuse, in whatever way they say so."""

import pytest

from lightning_quant.errors import ExportError, PlanError
from lightning_quant.runtimes._flat import exporting


class OddError(Exception):
    """Derived from nothing narrower, like some of ExecuTorch and of PyTorch's exporter."""


def test_errors_of_any_class_are_refusals() -> None:
    said = "Expected Engine to take the module, but it says: no such operator"
    with pytest.raises(ExportError, match=said), exporting("Engine"):
        raise OddError("no such operator")


def test_our_own_errors_and_interruptions_stay_as_they_are() -> None:
    for error in (PlanError("ours"), KeyboardInterrupt()):
        with pytest.raises(type(error)), exporting("Engine"):
            raise error
