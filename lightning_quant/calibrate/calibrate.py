"""Learn ranges from calls, and then whatever the recipe does for accuracy."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_quant.calls.calls import Call
from lightning_quant.calls.recorded_calls import recorded_calls
from lightning_quant.errors import CalibrationError
from lightning_quant.numerics.bias_correction import InputMeans
from lightning_quant.simulate.padding import hidden_left_out
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import device_of, evaluation_mode
from lightning_quant.terminal.progress import tracked


def calibrate(prepared: Prepared, steps: Iterable[Callable[[], Any]]) -> int:
    """Observe every quantized tensor while steps run the module in eval mode; return the number of steps.

    Where channels can be aligned, or the recipe has `accuracy_steps`, calls are kept in memory for that.

    Args:
        prepared: detached; its observers are updated.
        steps: each calls the module at least once.

    Raises:
        CalibrationError: there was no step, or a tensor was never seen or is not finite.
    """
    from lightning_quant.calibrate.alignment import align_channels, alignable
    from lightning_quant.calibrate.ladder import climb

    recipe = prepared.recipe
    means = InputMeans() if recipe.bias_correction else None
    groups = alignable(prepared) if recipe.align_channels else []
    with recorded_calls(prepared.root, None if groups or recipe.accuracy_steps else 0) as calls:
        number = observe(prepared, steps, means)
    settle(prepared, number, means)
    aligned = align_channels(prepared, groups, calls) if groups else None
    climbed = climb(prepared, calls) if recipe.accuracy_steps else ()
    prepared.accuracy_steps = climbed if aligned is None else (aligned, *climbed)
    return number


def observe(prepared: Prepared, steps: Iterable[Callable[[], Any]], means: InputMeans | None) -> int:
    """Run steps in eval mode while ranges, and means when wanted, follow; return the number of steps."""
    number = 0
    with (
        _noting_sizes(prepared),
        prepared.simulation.measuring(means),
        evaluation_mode(prepared.root),
        prepared.attached("observe", observing=True),
        hidden_left_out(prepared),
    ):
        for step in tracked(steps, "Calibrating", "batch"):
            step()
            number += 1
    return number


@contextmanager
def _noting_sizes(prepared: Prepared) -> Iterator[None]:
    """Let calls tell which sizes vary where the module itself has no graph that would see them."""
    if "" in prepared.islands:
        yield
        return
    handle = prepared.root.register_forward_pre_hook(
        lambda _, args, kwargs: prepared.note_sizes(args, kwargs), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def settle(prepared: Prepared, number: int, means: InputMeans | None) -> None:
    """Check what was observed in a number of steps, and correct the biases by the means when there are any.

    Raises:
        CalibrationError: there was no step, or a tensor was never seen or is not finite.
    """
    if number == 0:
        raise CalibrationError("Expected calibration data to yield at least one batch, but it yielded none.")
    observe_unreached(prepared)
    prepared.ranges.forget_parameters()
    prepared.ranges.check()
    if means is not None:
        prepared.correct_biases(means)


def as_call(item: Any) -> Call:
    """Read one item of calibration data: a tensor, a tuple or list of positional arguments, or a dict of keywords."""
    if isinstance(item, Call):
        return item
    if isinstance(item, dict):
        return Call((), item)
    return Call(tuple(item) if isinstance(item, tuple | list) else (item,))


def steps_of(prepared: Prepared, calls: Iterable[Any]) -> Iterable[Callable[[], Any]]:
    """Yield a step for every item of calibration data."""
    device = device_of(prepared.root)
    for item in calls:
        args, kwargs = as_call(item).map(lambda tensor: tensor.to(device))
        yield torch.no_grad()(functools.partial(prepared.root, *args, **kwargs))


@torch.no_grad()
def observe_unreached(prepared: Prepared) -> None:
    """Learn ranges that no batch has reached from the captured call, where validation goes ways of its own."""
    ranges = prepared.ranges
    missing = {identity for identity, observer in ranges.observers.items() if observer.low is None}
    if not missing or not prepared.learns_from_captured:
        return

    def watch(identity: str, x: Tensor) -> None:
        if identity in missing:
            ranges.observe(identity, prepared.on_grid(identity, x, clipped=True))

    device = device_of(prepared.root)
    args, kwargs = prepared.call([tensor.to(device) for tensor in prepared.tensors])
    with (
        torch.random.fork_rng(devices=[]),
        evaluation_mode(prepared.root),
        prepared.simulation.watching(watch),
        prepared.attached("off"),
    ):
        prepared.root(*args, **kwargs)
