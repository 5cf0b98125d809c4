"""Whether a forward answers one call in one way, or as what it has changed in the module makes it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_quant.calls.calls import Call, map_tensors
from lightning_quant.errors import CaptureError
from lightning_quant.graph.faithful import agree, seeded
from lightning_quant.graph.side_effects import attributes
from lightning_quant.surgery.routing import as_exported, clone, evaluation_mode

# Decibels: what other sums of the same numbers leave is far above.
_ENOUGH_DB = 90.0


def state_of(module: nn.Module) -> dict[str, Any]:
    """Return what a forward may change in a module, by name: which object it is, and how often it was written into."""
    return {
        f"{path}.{name}".lstrip("."): (id(value), value._version if isinstance(value, Tensor) else value)
        for path, held in attributes(module).items()
        for name, value in held.items()
        if isinstance(value, Tensor | int | float | complex | str)
    }


def check_state(module: nn.Module, before: dict[str, Any], run: Callable[[], Any]) -> None:
    """Refuse a forward that answers one call in several ways, since it reads what it changes: no file keeps that.

    Args:
        module: that was called once.
        before: its `state_of` before that call.
        run: calls it again.

    Raises:
        CaptureError: names what the forward changes.
    """
    after = state_of(module)
    changed = sorted(name for name, value in after.items() if before.get(name) != value)
    if changed and not agree(seeded(module, run), seeded(module, run), _ENOUGH_DB):
        raise CaptureError(
            f"Expected {type(module).__name__} to answer the same call alike each time in evaluation, but its forward "
            f"changes {', '.join(map(repr, changed[:3]))}, and answers otherwise then. A file keeps no such state: "
            'change it in training alone (`if self.training:`), or quantize a child without it (`module="..."`).'
        )


def check_call(module: nn.Module, call: Call) -> None:
    """Refuse a module that answers a call in several ways, as `check_state` does, after calls of a copy.

    Raises:
        CaptureError: names what the forward changes.
    """
    with evaluation_mode(module), as_exported():
        copy = clone(module, unrouted=True)
        before = state_of(copy)

        def run() -> Any:
            return copy(*map_tensors(Tensor.clone, call.args), **map_tensors(Tensor.clone, call.kwargs))

        seeded(copy, run)
        check_state(copy, before, run)
