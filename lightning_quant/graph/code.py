"""Python code of graphs whose modules have any names that `ModuleDict` and `add_module` take."""

import keyword
from typing import Any

from torch import fx, nn
from torch.fx.graph import CodeGen

# Has what every GraphModule has as an attribute.
_EMPTY = fx.GraphModule(nn.Module(), fx.Graph())


class CodeOfAnyNames(CodeGen):
    """Writes names of modules as they have to stand in code; PyTorch puts them between quotes as they are.

    A node that is named after a child called `self`, of attention say, must not hide the module.
    """

    def _gen_python_code(self, nodes: Any, root_module: str, namespace: Any, **kwargs: Any) -> Any:
        namespace.create_name(root_module, None)
        named = [(node, node.target) for node in nodes if node.op in ("call_module", "get_attr")]
        try:
            for node, target in named:
                node.target = ".".join(map(_escaped, str(target).split(".")))
            return super()._gen_python_code(nodes, root_module, namespace, **kwargs)
        finally:
            for node, target in named:
                node.target = target


def with_any_names(graph: fx.Graph) -> fx.Graph:
    """Let a graph's code be right whatever its modules are called; returns the graph."""
    graph.set_codegen(CodeOfAnyNames())
    return graph


def clear_of_own_names(graph: fx.Graph, module: nn.Module) -> list[str]:
    """Call children by other names where a GraphModule has an attribute of that name, `graph`; return the new names."""
    renamed = []
    for node in graph.nodes:
        first, *rest = str(node.target).split(".")
        if node.op in ("call_module", "get_attr") and first in module._modules and hasattr(_EMPTY, first):
            name = f"child_{first}"
            if name not in renamed:
                module.add_module(name, module.get_submodule(first))
                renamed.append(name)
            node.target = ".".join((name, *rest))
    return renamed


def _escaped(name: str) -> str:
    """Return what stands for a name between double quotes, or the name itself where it is an attribute's."""
    if name.isidentifier() and not keyword.iskeyword(name):
        return name
    return "".join(c if c.isalnum() and c.isascii() and index else f"\\U{ord(c):08x}" for index, c in enumerate(name))
