"""Factors and shifts of channels behind a layer: a frozen BatchNorm written out, layer scale, gains, ActNorm."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from lightning_quant.graph import operations as ops

_FUNCTIONS: dict[Any, str] = {
    operator.mul: "mul", torch.mul: "mul", operator.add: "add", torch.add: "add", operator.sub: "sub",
    torch.sub: "sub", operator.truediv: "div", torch.div: "div",
}  # fmt: skip
_METHODS = {"mul": "mul", "add": "add", "sub": "sub", "div": "div"}


def affine_parts(node: fx.Node, is_constant: Any) -> tuple[str, int, Any] | None:
    """Return what a node does to a tensor with a constant, the tensor's position among its arguments, and the constant.

    None where it does something else. What is taken from a constant, or divides one, is no such step.

    Args:
        node: of a graph in evaluation.
        is_constant: tells whether a node is computed from parameters and buffers alone.
    """
    kind = _METHODS.get(str(node.target)) if node.op == "call_method" else None
    kind = _FUNCTIONS.get(node.target) if node.op == "call_function" else kind
    if kind is None or len(node.args) != 2 or node.kwargs:
        return None
    for position, value in ((0, node.args[1]), (1, node.args[0])):
        read: Any = node.args[position]
        if position == 1 and kind in ("sub", "div"):
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(read, fx.Node) and (is_number or (ops.is_float(value) and is_constant(value))):
            return kind, position, value
    return None


def is_of_channels(value: Any, shape: tuple[int, ...], axis: int) -> bool:
    """Tell whether a constant has one value for all, or one for each channel, of a tensor of a shape.

    Args:
        value: number or node.
        shape: of the tensor that it is put on.
        axis: dimension of the channels in it.
    """
    if not isinstance(value, fx.Node):
        return True
    fake = value.meta.get("fake")
    if not isinstance(fake, Tensor) or fake.dim() > len(shape):
        return False
    sizes = (1,) * (len(shape) - fake.dim()) + tuple(fake.shape)
    axis %= len(shape)
    return all(size == 1 or (place == axis and size == shape[axis]) for place, size in enumerate(sizes))
