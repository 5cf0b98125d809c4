"""Errors are of one family, and survive the way between processes."""

import inspect
import pickle

import pytest

from lightning_quant import errors
from lightning_quant.errors import NoEffectWarning, QuantizationError, UnpicklableError, UntraceableError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if issubclass(kind, Exception) and kind is not NoEffectWarning]
)
def test_every_error_is_a_value_error_and_says_the_same_in_another_process(kind: type[Exception]) -> None:
    assert issubclass(kind, QuantizationError)
    assert issubclass(kind, ValueError)
    assert str(pickle.loads(pickle.dumps(kind("what was wrong")))) == "what was wrong"


def test_what_cannot_be_pickled_says_so_to_code_that_tries() -> None:
    assert issubclass(UnpicklableError, pickle.PicklingError)


def test_places_of_a_forward_that_cannot_be_traced_are_kept() -> None:
    assert UntraceableError("no").places == {}
    assert UntraceableError("no", {"layer": "branches"}).places == {"layer": "branches"}
