"""Calls that are as captured are seen without pytree; all others are left to the checks that say what is wrong."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.calls import signature as signatures
from lightning_quant.calls.calls import CapturedCall, flatten_call, forward_signature
from lightning_quant.calls.signature import Signature, make_signature

X, MASK = torch.randn(4, 3), torch.ones(4, dtype=torch.bool)


def forward(x: Tensor, mask: Tensor, scale: float = 2.0, *others: Any, mode: str | None = None, **more: Any) -> Tensor:
    return x * scale


def captured(*args: Any, function: Any = forward, **kwargs: Any) -> Signature:
    own = forward_signature(function)
    spec, tensors = flatten_call(own, args, kwargs)
    dynamic = {name: {0: "batch"} for name, tensor in zip(spec.names, tensors, strict=True) if len(tensor) == 4}
    return make_signature(CapturedCall(own, spec, tensors, dynamic), X, [(0, 1)])


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, MASK), {}),
        ((X[:2], MASK[:2], 2.0), {}),
        ((X,), {"mask": MASK}),
        ((), {"mask": MASK, "x": X, "scale": 2.0, "mode": None}),
        ((nn.Parameter(X), MASK), {}),
    ],
)
def test_what_is_as_captured_is_bound_at_once(
    args: Any, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = captured(X, MASK)
    expected = made._flatten_any(args, kwargs)
    monkeypatch.setattr(signatures, "flatten_call", None)
    assert all(one is other for one, other in zip(made.flatten(args, kwargs), expected, strict=True))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, MASK, 3.0), {}),
        ((X, MASK, 2), {}),
        ((X, MASK), {"x": X}),
        ((X, MASK), {"other": 1}),
        ((X, MASK), {"mode": "sum"}),
        ((X, MASK, 2.0, 1), {}),
        ((X,), {}),
        ((X, None), {}),
        ((X.double(), MASK), {}),
        ((X[:, :2], MASK), {}),
        ((X[0], MASK), {}),
        ((X[:2], MASK), {}),
        ((X.to_sparse(), MASK), {}),
        ((X.to("meta"), MASK), {}),
    ],
)
def test_all_else_is_looked_at_closely(args: Any, kwargs: dict[str, Any]) -> None:
    flat = captured(X, MASK)._flat
    assert flat is not None
    assert flat.bind((X, MASK), {}) is not None
    assert flat.bind(args, kwargs) is None


def test_signatures_with_structures_are_not_flat() -> None:
    def nested(batch: Any, scale: float = 1.0) -> Tensor:
        return batch

    assert captured({"x": X}, function=nested)._flat is None
    assert captured([], X, function=nested)._flat is None
    assert captured(X, function=nested)._flat is not None
    assert captured(X, MASK, 2.0, X)._flat is None
    assert captured(X, MASK, bias=X)._flat is None
    assert captured(X, MASK, scale=3.0)._flat is not None


def test_a_default_that_is_not_what_was_captured_must_be_given() -> None:
    flat = captured(X, MASK, scale=3.0)._flat
    assert flat is not None
    assert flat.bind((X, MASK), {}) is None
    assert flat.bind((X, MASK), {"scale": 3.0}) is not None
