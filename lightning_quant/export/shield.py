"""What keeps runtimes from quantizing, unasked, float layers that read a quantized tensor."""

from collections.abc import Collection

import torch
from torch import fx, nn

from lightning_quant.graph import operations as ops
from lightning_quant.graph.analyze import Island, has_weights
from lightning_quant.simulate.prepared import Prepared


def shield_float_layers(prepared: Prepared, island: Island, nodes: dict[str, fx.Node], module: nn.Module) -> None:
    """Put a clip to the tensor's own range, which changes nothing, between a quantized tensor and float layers.

    ONNX Runtime quantizes the weights of a float layer that reads DequantizeLinear directly, per tensor (its
    transformer WeightBiasQuantization, 1.20 to 1.31), and runs a softmax between two quantized tensors in integers,
    47 dB from its simulation where ties alone leave 63. OpenVINO moves the dequantization behind a pool and a reshape,
    and then rounds what the pool averages, or pads integers with 0 whichever of them stands for zero; it moves it
    behind clips, too, but not behind a maximum (its low-precision passes, 2026.4, read from compiled models).
    """
    edges = {edge.key: edge.identity for edge in island.plan.edges}
    moves_dequantization = prepared.runtime.TABLE.moves_dequantization
    for node in list(nodes.values()):
        is_float = node.meta["key"] not in island.plan.weighted and _runs_weights(node, module)
        is_float = is_float or ops.describe(node, module).kind in prepared.runtime.TABLE.quantized_unasked
        if not is_float and not (moves_dequantization and _is_changed(node, island, edges, module)):
            continue
        for source in ops.tensor_inputs(node):
            origin = source
            while origin.meta["key"] not in edges and ops.describe(origin, module).kind in ops.MOVING:
                origin = ops.moved_from(origin)
            identity = edges.get(origin.meta["key"])
            if identity is None or identity in prepared.channels:
                continue
            grid, (scale, zero_point) = prepared.ranges.grid_of(identity), prepared.ranges.parameters(identity)
            low = (grid.low - zero_point - 1) * scale
            high = (grid.high - zero_point + 1) * scale
            with node.graph.inserting_before(node):
                if moves_dequantization:
                    lowest = node.graph.call_function(torch.full, ((), low.item()))
                    clipped = node.graph.call_function(torch.maximum, (source, lowest))
                else:
                    clipped = node.graph.call_function(torch.clamp, (source, low.item(), high.item()))
            node.replace_input_with(source, clipped)


def _runs_weights(node: fx.Node, module: nn.Module) -> bool:
    operation = ops.describe(node, module)
    if operation.kind in ops.WEIGHTED:
        return True
    return node.op == "call_module" and has_weights(module.get_submodule(str(node.target)))


def _is_changed(node: fx.Node, island: Island, edges: Collection[str], module: nn.Module) -> bool:
    """Tell whether a node is a float average over windows, which OpenVINO would round, or over padded zeros."""
    kind = ops.describe(node, module).kind
    if kind not in ("avg_pool", "adaptive_avg_pool") or node.meta["key"] in {o.key for o in island.plan.operators}:
        return False
    if kind == "avg_pool" and ops.averages_padding(node, module):
        return True
    return node.meta["key"] not in edges
