"""What keeps runtimes from quantizing, unasked, float layers that read a quantized tensor."""

import torch
from torch import fx, nn

from lightning_quant import runtimes
from lightning_quant.graph import operations as ops
from lightning_quant.graph.analyze import Island, has_weights
from lightning_quant.graph.plan import identify
from lightning_quant.prepared import Prepared

# Kinds that move values of a quantized tensor without changing them.
_MOVING = ("reshape", "max_pool", "pad")


def shield_float_layers(prepared: Prepared, island: Island, nodes: dict[str, fx.Node], module: nn.Module) -> None:
    """Put a clip to the tensor's own range, which changes nothing, between a quantized tensor and float layers.

    ONNX Runtime quantizes the weights of a float layer that reads DequantizeLinear directly, per tensor (its
    transformer WeightBiasQuantization, 1.20 to 1.31). OpenVINO moves the dequantization behind a pool and a reshape,
    and then rounds what the pool averages (its low-precision passes, 2026.4, read from compiled models).
    """
    edges = {edge.key for edge in island.plan.edges}
    rounds_pools = runtimes.get(prepared.plan.runtime).TABLE.rounds_pools
    for node in list(nodes.values()):
        is_float = node.meta["key"] not in island.plan.weighted and _runs_weights(node, module)
        if not is_float and not (rounds_pools and _is_rounded(node, edges, module)):
            continue
        for source in ops.tensor_inputs(node):
            origin = source
            while origin.meta["key"] not in edges and ops.describe(origin, module).kind in _MOVING:
                origin = origin.args[0]  # type: ignore[assignment]
            identity = identify(island.path, origin.meta["key"])
            if origin.meta["key"] not in edges or identity in prepared.channels:
                continue
            scale, zero_point = prepared.ranges.parameters(identity)
            low = (-zero_point - 1) * scale
            high = (prepared.recipe.activation.quant_max - zero_point + 1) * scale
            with node.graph.inserting_before(node):
                clipped = node.graph.call_function(torch.clamp, (source, low.item(), high.item()))
            node.replace_input_with(source, clipped)


def _runs_weights(node: fx.Node, module: nn.Module) -> bool:
    operation = ops.describe(node, module)
    if operation.kind in ops.WEIGHTED:
        return True
    return node.op == "call_module" and has_weights(module.get_submodule(str(node.target)))


def _is_rounded(node: fx.Node, edges: set[str], module: nn.Module) -> bool:
    """Tell whether a node is a float average over windows with a reshape of it in float."""
    is_pool = ops.describe(node, module).kind in ("avg_pool", "adaptive_avg_pool")
    return is_pool and node.meta["key"] not in edges and _is_reshaped(node, edges, module)


def _is_reshaped(node: fx.Node, edges: set[str], module: nn.Module) -> bool:
    readers = {reader: ops.describe(reader, module).kind for reader in node.users if "key" in reader.meta}
    return any(
        (kind == "reshape" and reader.meta["key"] not in edges)
        or (kind == "pass" and _is_reshaped(reader, edges, module))
        for reader, kind in readers.items()
    )
