"""Tensors that products read in fewer bits than others do: what they read is rounded once more, to a grid of its own.

A residual stream, say, is the term of a sum and the input of a convolution. Rounded to few bits for the product's sake,
it would lose some more with each sum; so the sum reads it in eight bits, and the product rounds it anew. Published
results with few bits round what products read alone, and leave the stream in float (Esser et al. 2020,
arXiv:1902.08153, section 3).
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor, fx, nn

from lightning_quant.graph.analyze import Analysis, Island
from lightning_quant.graph.plan import Edge, Operator
from lightning_quant.graph.trace import trace
from lightning_quant.surgery.routing import evaluation_mode, resolve


def reread(x: Tensor) -> Tensor:
    """Return a tensor as it is: a node of its own, behind which it is rounded anew."""
    return x


def is_product(operator: Operator) -> bool:
    """Tell whether an operator multiplies what it reads by a weight, or by another tensor it reads."""
    return bool(operator.weight) or operator.kind == "matmul"


def with_rereads(analysis: Analysis, root: nn.Module, products: Collection[str]) -> Analysis:
    """Return an analysis in which products round anew what other operators, which are no products, read as well.

    Args:
        analysis: of the module.
        root: the module, on the CPU.
        products: identities of those that read few bits.
    """
    islands = tuple(_with_rereads(island, resolve(root, island.path), products) for island in analysis.islands)
    graphs = tuple(island.plan for island in islands) or analysis.plan.graphs
    return replace(analysis, plan=replace(analysis.plan, graphs=graphs), islands=islands)


def insert_rereads(island: Island, nodes: dict[str, fx.Node]) -> None:
    """Write the nodes behind which tensors are rounded anew into a graph.

    Args:
        island: that the graph was traced from.
        nodes: key to node of the graph; gets the new ones.
    """
    for key, readers in island.rereads.items():
        reading = [nodes[reader] for reader in readers if reader in nodes]
        if key not in nodes or not reading:
            continue
        source = nodes[key]
        with source.graph.inserting_after(source):
            node = source.graph.call_function(reread, (source,))
        node.meta.update({name: source.meta[name] for name in ("fake", "scope") if name in source.meta})
        node.meta["key"] = _reread_key(key)
        nodes[node.meta["key"]] = node
        for reader in reading:
            reader.replace_input_with(source, node)


def _with_rereads(island: Island, module: nn.Module, products: Collection[str]) -> Island:
    readers = _readers(island, products)
    if not readers:
        return island
    with evaluation_mode(module):
        graph = trace(module, island.spec, island.tensors, set(island.opaque)).graph
    nodes = {node.meta["key"]: node for node in graph.nodes if "key" in node.meta}
    # What reads a tensor by way of another node, which the plan does not name, stays as it is.
    rereads = {
        key: names for key, names in readers.items() if all(nodes[key] in nodes[n].all_input_nodes for n in names)
    }

    def rereading(operator: Operator) -> Operator:
        if operator.identity not in products:
            return operator
        return replace(operator, inputs=tuple(_reread_key(k) if k in rereads else k for k in operator.inputs))

    edges: list[Edge] = []
    for edge in island.plan.edges:
        new = _reread_key(edge.key)
        edges += [edge, Edge(new, new, path=edge.path)] if edge.key in rereads else [edge]
    plan = replace(island.plan, operators=tuple(map(rereading, island.plan.operators)), edges=tuple(edges))
    return replace(island, plan=plan, rereads=rereads)


def _readers(island: Island, products: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return edge to the nodes that read it for products of few bits, where no others and some other operators do."""
    members = Counter(edge.group for edge in island.plan.edges)
    readers = {}
    for edge in island.plan.edges:
        reading = [operator for operator in island.plan.operators if edge.key in operator.inputs]
        inner = [operator for operator in reading if operator.identity in products]
        beside = [operator for operator in reading if operator.identity not in products]
        if members[edge.group] == 1 and edge.observed and inner and beside and not any(map(is_product, beside)):
            readers[edge.key] = tuple(operator.pad or operator.key for operator in inner)
    return readers


def _reread_key(key: str) -> str:
    return f"{key}/read"
