"""What a forward computes and does not return: exporters leave it out, so no plan may hold it."""

from torch import fx, nn

from lightning_quant.graph.operations import LISTED, describe


def remove_unread(graph: fx.Graph, root: nn.Module) -> list[tuple[fx.Node, str]]:
    """Erase the nodes of an evaluation graph that no result depends on; return those of layers, and the layers' types.

    Checks of the user's own and whatever else `torch.fx` knows to have an effect stay. In training all of it runs as
    ever: statistics are updated, and an auxiliary loss may read it.
    """
    removed: list[tuple[fx.Node, str]] = []
    for node in reversed(graph.nodes):
        if node.users or node.op in ("placeholder", "output") or (node.op != "call_module" and node.is_impure()):
            continue
        operation = describe(node, root)
        has_parameters = node.op == "call_module" and _has_parameters(node, root)
        if operation.kind in LISTED or has_parameters or node.meta.get("multiply_adds"):
            removed.append((node, operation.layer))
        graph.erase_node(node)
    return removed[::-1]


def _has_parameters(node: fx.Node, root: nn.Module) -> bool:
    return any(True for _ in root.get_submodule(str(node.target)).parameters())
