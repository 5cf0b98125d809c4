"""Float weights that nothing reads any more once graphs stand in place of what held them."""

from collections.abc import Iterable, Iterator
from operator import attrgetter

import torch
from torch import Tensor, nn

from lightning_quant.graph.qdq import BoundGraph


def drop_unread(converted: nn.Module, routed: Iterable[nn.Module]) -> None:
    """Take the tensors that a call reads no more from the modules that are routed to graphs, but for shapes and types.

    Args:
        converted: what is called.
        routed: modules inside whose places graphs have taken.
    """
    used = {id(tensor) for tensor in _tensors_read(converted)}
    for child in {id(child): child for module in routed for child in module.modules()}.values():
        for tensors in (child._parameters, child._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None and id(tensor) not in used:
                    del tensors[name]
                    child.__dict__[name] = torch.empty_like(tensor, device="meta", requires_grad=False)


def _tensors_read(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a call of a module may read: where a graph stands for it, those that the graph reads."""
    graph = module if isinstance(module, BoundGraph) else module.__dict__.get("forward")
    if isinstance(graph, BoundGraph):
        for node in graph.graph_module.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                target = attrgetter(str(node.target))(graph.graph_module)
                yield from _tensors_read(target) if isinstance(target, nn.Module) else (target,)
        return
    yield from (tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None)
    for child in module.children():
        yield from _tensors_read(child)
