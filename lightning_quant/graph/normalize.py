"""Turn in-place operations of a graph into ordinary ones, so that a quantizer can stand between any two nodes."""

import operator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn

from lightning_quant.errors import UntraceableError
from lightning_quant.graph.side_effects import writes_own_buffer

_FUNCTIONS = {
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    operator.isub: operator.sub,
    operator.itruediv: operator.truediv,
    F.relu_: F.relu,
    torch.relu_: torch.relu,
    F.hardtanh_: F.hardtanh,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
}
_VIEWS = {
    "view",
    "reshape",
    "flatten",
    "transpose",
    "permute",
    "squeeze",
    "unsqueeze",
    "getitem",
    "chunk",
    "split",
    "t",
}
_JOINS = (torch.cat, torch.concat, torch.concatenate)
_ACTIVATIONS: dict[type, Any] = {
    nn.ReLU: lambda m: (F.relu, {}),
    nn.ReLU6: lambda m: (F.relu6, {}),
    nn.Hardtanh: lambda m: (F.hardtanh, {"min_val": m.min_val, "max_val": m.max_val}),
    nn.LeakyReLU: lambda m: (F.leaky_relu, {"negative_slope": m.negative_slope}),
    nn.ELU: lambda m: (F.elu, {"alpha": m.alpha}),
    nn.SiLU: lambda m: (F.silu, {}),
    nn.Hardswish: lambda m: (F.hardswish, {}),
    nn.Hardsigmoid: lambda m: (F.hardsigmoid, {}),
    nn.Mish: lambda m: (F.mish, {}),
}


def functionalize(graph: fx.Graph, root: nn.Module) -> None:
    """Replace every in-place operation; later readers of the tensor it wrote read its result instead.

    Raises:
        UntraceableError: a write whose other readers cannot be followed: into a view of a tensor that is read again, or
            by index. Its `places` name the modules that do so.
    """
    places: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.target in _JOINS and _joins_one(node):
            node.replace_all_uses_with(node.args[0][0])
            graph.erase_node(node)
            continue
        by_index = node.target is operator.setitem or node.target in ("__setitem__", "copy_")
        if not (by_index or _writes(node, root)) or writes_own_buffer(node.args[0], root):
            continue
        reason = "it writes into a tensor by index or with copy_" if by_index else _refusal(node)
        if reason:
            places.setdefault(node.meta["site"][0].partition("(")[0], reason)
            continue
        for user in list(node.args[0].users):
            if user is not node and _comes_after(user, node):
                user.replace_input_with(node.args[0], node)
        _replace(node, root)
    if places:
        raise UntraceableError(next(iter(places.values())), places)


def _joins_one(node: fx.Node) -> bool:
    """Tell whether a node joins a single tensor, the first of a dense block say: runtimes leave that out."""
    return bool(node.args) and isinstance(node.args[0], tuple | list) and len(node.args[0]) == 1


def _writes(node: fx.Node, root: nn.Module) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_function":
        return node.target in _FUNCTIONS or node.kwargs.get("inplace") is True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.op == "call_module" and bool(getattr(root.get_submodule(str(node.target)), "inplace", False))


def _replace(node: fx.Node, root: nn.Module) -> None:
    if node.op == "call_function":
        node.target = _FUNCTIONS.get(node.target, node.target)  # type: ignore[arg-type, assignment]
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}
    elif node.op == "call_method":
        if hasattr(torch.Tensor, str(node.target)[:-1]):
            node.target = str(node.target)[:-1]
    elif type(module := root.get_submodule(str(node.target))) in _ACTIVATIONS and not _hooked(module):
        node.meta["module"] = node.target
        node.op = "call_function"
        node.target, node.kwargs = _ACTIVATIONS[type(module)](module)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _refusal(node: fx.Node) -> str:
    """Return why an in-place operation cannot be an ordinary one, or an empty text."""
    written: Any = node.args[0]
    if written.op == "get_attr":
        return f"it writes into its attribute {written.target} in place"
    name = getattr(written.target, "__name__", str(written.target))
    if written.op not in ("call_function", "call_method") or name not in _VIEWS:
        return ""
    source = written.args[0]
    if isinstance(source, fx.Node) and any(_comes_after(user, node) for user in source.users if user is not written):
        return "it writes in place into a view of a tensor that is read again"
    return ""


def _comes_after(node: fx.Node, other: fx.Node) -> bool:
    return other < node
