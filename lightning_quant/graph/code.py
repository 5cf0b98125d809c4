"""Python code of graphs whose modules have any names that `ModuleDict` and `add_module` take."""

import keyword
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen


class CodeOfAnyNames(CodeGen):
    """Writes names of modules as they have to stand in code; PyTorch puts them between quotes as they are."""

    def _gen_python_code(self, nodes: Any, *args: Any, **kwargs: Any) -> Any:
        named = [(node, node.target) for node in nodes if node.op in ("call_module", "get_attr")]
        try:
            for node, target in named:
                node.target = ".".join(map(_escaped, str(target).split(".")))
            return super()._gen_python_code(nodes, *args, **kwargs)
        finally:
            for node, target in named:
                node.target = target


def with_any_names(graph: fx.Graph) -> fx.Graph:
    """Let a graph's code be right whatever its modules are called; returns the graph."""
    graph.set_codegen(CodeOfAnyNames())
    return graph


def _escaped(name: str) -> str:
    """Return what stands for a name between double quotes, or the name itself where it is an attribute's."""
    if name.isidentifier() and not keyword.iskeyword(name):
        return name
    return "".join(c if c.isalnum() and c.isascii() and index else f"\\U{ord(c):08x}" for index, c in enumerate(name))
