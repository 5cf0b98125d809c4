"""Observers of several processes: what of them can become one, and how it does."""

from typing import Any

import torch
from torch import Tensor

from lightning_quant.errors import QuantizationError
from lightning_quant.numerics.fake_quantize import along
from lightning_quant.ranges import observers
from lightning_quant.ranges.observers import MERGES, Observer
from lightning_quant.recipe.recipe import Recipe


def check_mergeable(argument: str, name: str, recipe: Recipe, *, in_training: bool) -> None:
    """Make sure that observers of that name can serve several processes; before anything is trained.

    Args:
        argument: of the user, for the message.
        name: of the observer.
        recipe: with its settings.
        in_training: whether ranges follow every batch, of which processes exchange the extremes.

    Raises:
        QuantizationError: they cannot.
    """
    observer = observers.build(name, recipe)
    if in_training and observer.needs_values:
        raise QuantizationError(
            f"Expected `{argument}` to be 'moving_average' or 'min_max' in several processes, but got {name!r}, which "
            "needs more of a batch than its extremes."
        )
    # What it keeps shows when it has seen something.
    observer.update(torch.linspace(-1, 1, 8))
    _check_declared(f"`{argument}` {name!r}", observer, set(observer.state()))


def merged(observer: Observer, states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the one state that those of several processes make.

    Args:
        observer: of that kind.
        states: of processes that saw something, on one device.

    Raises:
        QuantizationError: a state that should be the same in all is not, or nobody said how one becomes one.
    """
    # One that only some values bring about was not there when the observer was checked.
    names = {name for state in states for name in state}
    _check_declared("an observer", observer, names)
    declared = [(name, how) for name, how in _declared(observer).items() if name in names]
    return {name: _one(name, how, [state for state in states if name in state]) for name, how in declared}


def _check_declared(what: str, observer: Observer, states: set[str]) -> None:
    unknown = sorted(states - set(_declared(observer)))
    if unknown:
        raise QuantizationError(
            f"Expected {what} to say how the states of several processes become one, but "
            f"{type(observer).__name__}.merge says nothing of {unknown}. Declare one of {list(MERGES)} for each in the "
            "class that updates them, or use one process."
        )


def _one(name: str, how: str, states: list[dict[str, Any]]) -> Any:
    weights = torch.tensor([float(state["num_updates"]) for state in states], dtype=torch.float64)
    values = [state[name] for state in states]
    if not isinstance(values[0], Tensor):
        numbers: Any = _one(name, how, [{**state, name: torch.tensor(state[name])} for state in states])
        return type(values[0])(numbers.item())
    stacked = torch.stack(values)
    if how == "same":
        if not bool((stacked == stacked[0]).all()):
            raise QuantizationError(f"Expected state {name!r} of an observer to be the same in all processes.")
        return values[0]
    if how == "mean":
        shares = along(weights / weights.sum(), stacked).to(stacked.device)
        return (stacked.double() * shares).sum(0).to(stacked.dtype)
    if how == "sum":
        return stacked.sum(0)
    return stacked.amin(0) if how == "min" else stacked.amax(0)


def _declared(observer: Observer) -> dict[str, str]:
    """Return how the states merge, as far as the class that updates them, or one derived from it, has said so."""
    classes = type(observer).__mro__
    updates = next(kind for kind in classes if {"_update", "_combine"} & set(vars(kind)))
    says = next(kind for kind in classes if "merge" in vars(kind))
    return observer.merge if classes.index(says) <= classes.index(updates) else Observer.merge
