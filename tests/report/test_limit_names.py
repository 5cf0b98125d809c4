from typing import Any

import pytest

from lightning_quant.errors import QuantizationError
from lightning_quant.report.limit_names import other_directions
from lightning_quant.report.limits import Limits, is_search, limits_from


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"val_acc": -0.005}, Limits({"val_acc": 0.005}, higher_is_better=["val_acc"])),
        ({"val_loss": 0.02}, Limits({"val_loss": 0.02}, lower_is_better=["val_loss"])),
        ({"m": 0}, Limits({"m": 0.0})),
        ({"size_ratio": 0.3, "speedup": 1.5}, Limits(max_size_ratio=0.3, min_speedup=1.5)),
        ({"size_bytes": 1000, "latency_ms": 2}, Limits(max_size_bytes=1000, max_latency_ms=2)),
        (
            {"val_acc": -0.1, "max_drop": {"other": 0.2}, "higher_is_better": ["other"]},
            Limits({"other": 0.2, "val_acc": 0.1}, higher_is_better=["other", "val_acc"]),
        ),
    ],
)
def test_limits_by_name_are_fields(given: dict[str, Any], meant: Limits) -> None:
    before = repr(given)
    assert limits_from(given) == meant
    assert is_search(given)
    assert repr(given) == before


@pytest.mark.parametrize("given", [None, {}, Limits(), {"max_drop": {"val_acc": 0.1}}, {"min_speedup": 1.0}])
def test_limits_by_field_are_no_search(given: Any) -> None:
    assert not is_search(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size_ration": 0.3}, "Did you mean 'size_ratio'"),
        ({"max_drops": {"m": 0.3}}, "Did you mean 'max_drop'"),
        ({"speedup": -1.0}, "above zero"),
        ({"latency_ms": float("inf")}, "above zero"),
        ({"m": True}, "`limits.m` to be a number"),
    ],
)
def test_what_is_no_limit_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        limits_from(given)


def test_directions_are_compared_where_both_are_known() -> None:
    known = {"acc": True, "loss": False, "unsaid": None}
    assert other_directions(known, {"acc": True, "loss": False, "unsaid": True, "new": False}) == []
    assert "allow acc to rise" in other_directions(known, {"acc": False})[0]
