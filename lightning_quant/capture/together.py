"""Independent modules that one step calls, quantized as one: each answers its own captured call."""

import inspect
from typing import Any

from torch import nn

from lightning_quant.surgery.routing import Route, has_own_forward, resolve, route, unroute


class PartCalls(dict[str, tuple[Any, Any]]):
    """Name of each module to its arguments `(args, kwargs)`: what stands for a call of all of them."""


class Together(Route):
    """Lets the module that owns several answer their calls; its own forward answers every other call."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what each module answers, by name; for another call what the root's own forward returns."""
        if len(args) == 1 and isinstance(args[0], PartCalls):
            return {name: resolve(self.root, name)(*call[0], **call[1]) for name, call in args[0].items()}
        return type(self.root).forward(self.root, *args, **kwargs)


def parts_of(args: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the names of the modules that a call is of, where it is of several."""
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], PartCalls) else ()


def signature_of_parts() -> inspect.Signature:
    """Return the signature of such a call."""
    return inspect.Signature([inspect.Parameter("calls", inspect.Parameter.POSITIONAL_ONLY)])


def join_parts(root: nn.Module) -> None:
    """Let a module answer calls of its parts from now on."""
    if has_own_forward(root):
        route(root, Together(root))


def part(root: nn.Module) -> None:
    """Give a module whose parts were joined its own forward back."""
    if isinstance(root.__dict__.get("forward"), Together):
        unroute(root)
