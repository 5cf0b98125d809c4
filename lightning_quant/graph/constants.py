"""Values that forward computes from parameters and buffers alone, as weight standardization does with its weights.

In evaluation they are constants, so they are folded and quantized like weights.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from lightning_quant.graph.code import with_any_names

# What is drawn anew at each call.
_RANDOM = frozenset({"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli"})
_RANDOM |= {"normal", "multinomial", "poisson"}


def constant(node: fx.Node, root: nn.Module) -> Callable[[nn.Module], Tensor] | None:
    """Return a function of a module that computes a node's value, which no input of the graph has a part in.

    Args:
        node: of a graph that was traced in evaluation.
        root: module that it was traced from; the function takes that, or another of its structure.
    """
    needed = ancestors(node)
    if any(read.op == "placeholder" or _is_random(read, root) for read in needed):
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for read in node.graph.nodes:
        if read in needed:
            copies[read] = graph.node_copy(read, copies.__getitem__)
    graph.output(copies[node])
    code = with_any_names(graph).python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<lightning_quant constant>", "exec"), namespace)
    return namespace["forward"]


def sources(node: fx.Node) -> list[str]:
    """Return the names of the parameters and buffers that a node's value is computed from."""
    return [str(read.target) for read in node.graph.nodes if read.op == "get_attr" and read in ancestors(node)]


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Return a node with all that it depends on."""
    above, left = {node}, [node]
    while left:
        for read in left.pop().all_input_nodes:
            if read not in above:
                above.add(read)
                left.append(read)
    return above


def is_of_parameters(node: Any) -> bool:
    """Tell whether a value is computed from parameters, buffers or nothing alone."""
    return isinstance(node, fx.Node) and all(read.op != "placeholder" for read in ancestors(node))


def _is_random(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return any(child.training for child in root.get_submodule(str(node.target)).modules())
    name = getattr(node.target, "__name__", str(node.target))
    return node.op.startswith("call_") and name.rstrip("_") in _RANDOM


def keep_constants(graph: fx.Graph, traced: nn.Module, root: nn.Module) -> None:
    """Turn tensors that forward makes from nothing, which fx hangs on the traced copy, into functions."""
    for node in graph.nodes:
        if (
            node.op == "get_attr"
            and str(node.target).startswith("_tensor_constant")
            and not hasattr(root, str(node.target))
        ):
            node.op, node.target = "call_function", _constant(getattr(traced, str(node.target)))


def _constant(value: Tensor) -> Callable[[], Tensor]:
    def constant() -> Tensor:
        return value

    return constant
