"""How a batch becomes a call of a forward: by names, or by position with what a forward does not take left out."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_quant.calls.calls import Call
from lightning_quant.errors import CalibrationError, CaptureError, QuantizationError
from lightning_quant.surgery.host import HOST, copied_to, moved_call
from lightning_quant.surgery.routing import device_of, evaluation_mode

ONE_CALL = "a tensor, a tuple of arguments or a dict of keyword arguments"
# What a forward raises that is called with something else than it takes.
_REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


@dataclass(frozen=True)
class Reading:
    """One way to call a forward with a batch.

    Attributes:
        call: from the batch, or another of the same form.
        left_out: what of it is no part of the call, in words; empty when all of it is.
        cast: what its floating-point numbers become, where a module in that precision does not run with others.
    """

    call: Callable[[Any], Call]
    left_out: str = ""
    cast: torch.dtype | None = None


def way_out(item: Any = None) -> str:
    """Return, as a sentence, how to write what is meant."""
    which = next((key for key in item if isinstance(item[key], Tensor)), "x") if isinstance(item, Mapping) else None
    example = "(x,) for x, *_ in loader" if which is None else f"(batch[{which!r}],) for batch in loader"
    return (
        f"Each item of `calibration_data` is one call of the module: {ONE_CALL}, as in `calibration_data=({example})`."
    )


def choose_reading(module: nn.Module, signature: inspect.Signature, item: Any, *, is_batch: bool) -> Reading:
    """Return the one way in which an item of calibration data is a call of a module's forward.

    Args:
        module: the float module.
        signature: of its forward.
        item: a call, or a batch; a clone of the module tries it, and tells where it might be meant in several ways.
        is_batch: whether it comes from a loader, so that it may hold what is not for the module, such as labels.

    Raises:
        CaptureError: no way fits the signature.
        CalibrationError: the forward runs in several ways, or in none.
    """
    readings = _readings(signature, item, is_batch=is_batch)
    if not readings:
        _refuse(signature, item)
    errors = {reading: _error(module, reading.call(item)) for reading in readings}
    running = [reading for reading, error in errors.items() if error is None]
    if not running:
        error = errors[readings[0]]
        said = next(iter(str(error).splitlines()), "")
        raise CalibrationError(
            f"Expected `calibration_data` to hold calls of `forward{signature}`, but the float module fails at the "
            f"first: {type(error).__name__}{said and f': {said}'}.{_hint(module, error)} "
            f"{way_out(item)}"
        ) from error
    # A forward that takes one argument is rather called with a part of a batch than with all of it.
    cut = [reading for reading in running if reading.call is not _whole]
    if len(cut) > 1:
        ways = " as with ".join(f"{len(reading.call(item)[0])}" for reading in cut)
        raise CalibrationError(
            f"Expected it to be clear which items of a batch `forward{signature}` takes, but it runs with {ways} of "
            f"the {len(item)}. {way_out(item)}"
        )
    best = (cut or running)[0]
    return replace(best, cast=_cast(module, best.call(item)))


def _readings(signature: inspect.Signature, item: Any, *, is_batch: bool) -> list[Reading]:
    if isinstance(item, Mapping):
        return _by_name(signature, dict(item), dict)
    if isinstance(item, tuple) and hasattr(item, "_asdict"):
        named = _by_name(signature, item._asdict(), lambda batch: batch._asdict())
        if named and named[0].call is not _whole:
            return named
    if isinstance(item, tuple | list):
        return _by_position(signature, item, is_batch=is_batch)
    return [Reading(_whole)] if _fits(signature, (item,), {}) else []


def _by_name(signature: inspect.Signature, item: dict[str, Any], as_dict: Callable[[Any], dict]) -> list[Reading]:
    parameters = signature.parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    kept = [name for name in item if takes_all or name in known]
    if kept and _fits(signature, (), {name: item[name] for name in kept}):
        others = [f"{name!r}" for name in item if name not in kept]
        left_out = f"{', '.join(others)}: no argument of `forward{signature}`" if others else ""
        return [Reading(lambda batch: Call((), {name: as_dict(batch)[name] for name in kept}), left_out)]
    if not kept and _fits(signature, (item,), {}):
        return [Reading(_whole)]
    return []


def _by_position(signature: inspect.Signature, item: tuple[Any, ...] | list[Any], *, is_batch: bool) -> list[Reading]:
    fitting = [number for number in range(1, len(item) + 1) if _fits(signature, item[:number], {})]
    if len(item) in fitting and not is_batch:
        # Written as a call, with all arguments that are meant.
        fitting = [len(item)]
    fitting = [number for number in fitting if _may_take(signature, item[:number])] or fitting
    readings = []
    for number in fitting:
        others = ", ".join(_describe(value) for value in item[number:])
        first = "the first item" if number == 1 else f"the first {number} items"
        left_out = f"{others}: `forward{signature}` takes {first}" if others else ""
        readings.append(
            Reading(lambda batch, n=number: Call(tuple(batch[:n])), left_out)  # type: ignore[misc]
        )
    if readings and readings[0].left_out and _fits(signature, (item,), {}):
        readings.append(Reading(_whole))
    return readings


def _whole(batch: Any) -> Call:
    return Call((batch,))


def _fits(signature: inspect.Signature, args: Any, kwargs: dict[str, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _may_take(signature: inspect.Signature, args: Any) -> bool:
    """Tell whether no tensor would be a switch, a number or a text, by the defaults."""
    bound = signature.bind(*args).arguments
    defaults = {name: signature.parameters[name].default for name in bound}
    return not any(
        isinstance(value, Tensor) and isinstance(defaults[name], bool | int | float | str)
        for name, value in bound.items()
    )


@torch.no_grad()
def run_call(module: nn.Module, call: Call, number: int) -> None:
    """Run one of several calls.

    Raises:
        CalibrationError: the forward does not take it; the message says which call that is.
    """
    try:
        module(*call.args, **call.kwargs)
    except _REFUSALS as error:
        if isinstance(error, QuantizationError):
            raise
        sizes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(tuple(call)) if isinstance(leaf, Tensor)]
        said = next(iter(str(error).splitlines()), "")
        raise CalibrationError(
            f"Expected every item of `calibration_data` to be a call of the module, but item {number}, of {sizes}, "
            f"fails: {type(error).__name__}{said and f': {said}'}."
        ) from error


def _error(module: nn.Module, call: Call) -> Exception | None:
    """Return what a forward raises at a call; None when it runs."""
    # Where it will be planned.
    return _raised(copied_to(module, HOST, unrouted=True), moved_call(*call))


def _cast(module: nn.Module, call: Call) -> torch.dtype | None:
    """Return a module's precision where a call is in another one and, without a cast, fails for that."""
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if own is None or all(tensor.dtype == own for tensor in tensors):
        return None
    copy = copied_to(module, device_of(module), in_float32=False, unrouted=True)
    return None if _raised(copy, call) is None else own


def _raised(copy: nn.Module, call: Call) -> Exception | None:
    args, kwargs = call
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluation_mode(copy):
        try:
            copy(*args, **kwargs)
        except _REFUSALS as error:
            return error
    return None


def _hint(module: nn.Module, error: Exception | None) -> str:
    """Return, as a sentence, what to quantize where the module has no forward of its own."""
    children = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    known = isinstance(error, NotImplementedError) and children
    return f" Quantize a part that has a forward: `model.{children[0]}`." if known else ""


def _refuse(signature: inspect.Signature, item: Any) -> None:
    if isinstance(item, Mapping):
        args, kwargs = (), dict(item)
    else:
        args, kwargs = tuple(item) if isinstance(item, tuple | list) else (item,), {}
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"Expected a call that fits `forward{signature}`, but got one where {error}. {way_out(item)}"
        ) from error


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
