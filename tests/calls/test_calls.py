"""Calls are bound, flattened and rebuilt as they were."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_quant.calls.calls import Call, CapturedCall, flatten_call, forward_signature, rebuild_call


def _adds_keyword(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add an argument by keyword, as decorators of transformers do."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{"use_cache": False, **kwargs})

    return wrapper


@_adds_keyword
def _decorated(tokens: Tensor, mask: Tensor | None = None, use_cache: bool | None = None) -> tuple[Any, ...]:
    return tokens, mask, use_cache


def _various(first: Tensor, /, second: Tensor, *others: Tensor, third: int = 3, **rest: int) -> tuple[Any, ...]:
    return first, second, others, third, rest


def _rebuilt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    signature = forward_signature(function)
    spec, tensors = flatten_call(signature, args, kwargs)
    args, kwargs = rebuild_call(signature, spec.arguments(tensors))
    return function(*args, **kwargs)


def test_decorators_may_add_arguments_by_keyword() -> None:
    tokens, mask = torch.tensor([1, 2]), torch.tensor([1, 1])
    assert _rebuilt(_decorated, tokens, mask) == (tokens, mask, None)
    assert _rebuilt(_decorated, tokens=tokens) == (tokens, None, None)


def test_every_kind_of_argument_arrives_where_it_was() -> None:
    one, two, three = torch.ones(1), torch.zeros(1), torch.full((1,), 3.0)
    assert _rebuilt(_various, one, two) == (one, two, (), 3, {})
    assert _rebuilt(_various, one, second=two, third=4, more=5) == (one, two, (), 4, {"more": 5})
    assert _rebuilt(_various, one, two, three, third=4) == (one, two, (three,), 4, {})


def test_captured_call_binds_other_tensors() -> None:
    def forward(self, image, *, mask=None, scale=1.0): ...  # type: ignore[no-untyped-def]

    signature = forward_signature(forward.__get__(object()))
    image, mask = torch.ones(2, 3), torch.zeros(2)
    captured = CapturedCall(signature, *flatten_call(signature, (image,), {"mask": mask, "scale": 2.0}))

    assert captured.names == ("image", "mask")
    assert captured.sizes == {"image": (2, 3), "mask": (2,)}
    assert captured.dynamic == {}
    (args, kwargs), own = captured.bind([image + 1, mask + 1]), captured.bind()
    assert torch.equal(args[0], image + 1)
    assert torch.equal(kwargs["mask"], mask + 1)
    assert kwargs["scale"] == own.kwargs["scale"] == 2.0
    assert own.args[0] is image


def test_call_is_detached_in_copies() -> None:
    x = torch.ones(2, requires_grad=True)
    call = Call((x, 3), {"mask": [x]})
    copied = call.detached()

    assert isinstance(copied, Call)
    assert copied.args[1] == 3
    for tensor in (copied.args[0], copied.kwargs["mask"][0]):
        assert not tensor.requires_grad
        assert torch.equal(tensor, x)
        assert tensor.data_ptr() != x.data_ptr()
