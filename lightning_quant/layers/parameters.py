"""Weights that a module's own forward reads, such as the stacked experts of a mixture, stored and read in float."""

import functools
import math
from typing import Any

from torch import Tensor, fx, nn

from lightning_quant.graph.plan import join
from lightning_quant.layers.layer import StoredLayer
from lightning_quant.layers.storage import Scheme, dequantize

CHILD = "stored_parameters"
"""Name of the child, in the module that reads them, that holds such weights."""


# Values of a row at least, so that scales take little beside them.
_MIN_ROW = 16


class StoredParameters(StoredLayer):
    """Holds stored weights for the module around it, whose attributes give them in float at each reading.

    So whatever the module computes of them, and its class, methods and children, stay as they are.

    Attributes:
        shapes: name of each weight to its shape in float.
    """

    def __init__(self, float_layer: nn.Module, scheme: Scheme, stored: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        nn.Module.__init__(self)
        self.scheme, self.names, self.shared = scheme, {name: name for name in stored}, {}
        self.kind = type(float_layer).__name__
        self.shapes = {name: float_layer.get_parameter(name).shape for name in stored}
        for name, (weight, scale) in stored.items():
            self.register_buffer(name, weight)
            if scale is not None:
                self.register_buffer(f"{name}_scale", scale)

    @staticmethod
    def rows(float_layer: nn.Module, name: str) -> Tensor:
        """Return a weight as it is stored: a matrix with a row for each but the last dimension, or the last few.

        A row of a kernel's three values would have a scale of its own.
        """
        weight = float_layer.get_parameter(name)
        first = next((d for d in range(weight.dim() - 1, 1, -1) if math.prod(weight.shape[d:]) >= _MIN_ROW), 1)
        return weight.flatten(first).flatten(0, -2)

    @classmethod
    def refusal(cls, float_layer: nn.Module, scheme: Scheme, group_size: int) -> str:
        """Return why a module's weights have no such form, or an empty text."""
        if scheme.arithmetic == "integer":
            return "its own code reads the weights in float"
        return "no 4-bit form" if scheme.storage == "int4" else ""

    def value(self, name: str) -> Tensor:
        """Return a weight in float32, in its own shape."""
        return dequantize(*self.stored(name)).view(self.shapes[name])

    def forward(self, name: str) -> Tensor:
        """Return a weight, for graphs that read it."""
        return self.value(name)

    def extra_repr(self) -> str:
        """Say how the weights are stored."""
        return f"{', '.join(self.names)} of {self.kind}, {self.scheme.action}"

    def put_in(self, owner: nn.Module) -> None:
        """Take the place of the module's own parameters; does nothing when they are gone already."""
        present = [name for name in self.names if name in owner._parameters]
        for name in present:
            del owner._parameters[name]
        owner._modules[CHILD] = self
        if present:
            kind: Any = type(owner)
            owner.__class__ = _reading(kind, tuple(self.names))


class FloatParameters(nn.Module):
    """Remembers a module's parameters while stored ones are in their place."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._parameters.update(owner._parameters)
        self.__dict__["before"] = type(owner), dict(owner._parameters)

    def put_in(self, owner: nn.Module) -> None:
        """Give the parameters back, in their order."""
        owner.__class__, parameters = self.before  # type: ignore[misc]
        owner._modules.pop(CHILD, None)
        owner._parameters.clear()
        owner._parameters.update(parameters)


def child_of(path: str) -> str:
    """Return the path of the child that holds the stored weights of the module at a path."""
    return join(path, CHILD)


@functools.cache
def _reading(kind: Any, names: tuple[str, ...]) -> Any:
    """Return a module's class with properties for weights that are stored."""
    values = {name: property(functools.partial(_read, name=name)) for name in names}
    made = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce_ex__": _reduce}
    return type(kind.__name__, (kind,), {**values, **made, "_read_in_float": names})


def _read(module: nn.Module, name: str) -> Tensor:
    return module._modules[CHILD].value(name)  # type: ignore[union-attr, operator]


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    return _new, (type(self).__bases__[0], self._read_in_float), self.__getstate__()


def _new(kind: Any, names: tuple[str, ...]) -> Any:
    made = _reading(kind, names)
    return made.__new__(made)


def read_from_children(graph: fx.Graph, module: nn.Module) -> None:
    """Let a graph call the children that hold stored weights where it reads those: it would keep their float form."""
    for node in graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            holder = dict(module.get_submodule(owner).named_children()).get(CHILD)
            if isinstance(holder, StoredParameters) and name in holder.names:
                node.op, node.target, node.args = "call_module", child_of(owner), (name,)
