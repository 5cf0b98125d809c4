"""From fake quantization to the QDQ graph: int8 weights, int32 biases, quantize and dequantize pairs on edges.

The result is an ordinary float module with `quantized_decomposed` operators, the one form that every runtime reads. It
shares what stays float with the user's module and holds no other copy of a weight.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn

from lightning_quant.errors import ExportError
from lightning_quant.export.float_weights import drop_unread
from lightning_quant.export.shield import shield_float_layers
from lightning_quant.graph import operations as ops
from lightning_quant.graph.analyze import Island
from lightning_quant.graph.candidates import is_left_out
from lightning_quant.graph.code import clear_of_own_names, with_any_names
from lightning_quant.graph.moves import border_of
from lightning_quant.graph.named_edges import EdgeQuantizer
from lightning_quant.graph.plan import Operator
from lightning_quant.graph.qdq import BoundGraph, InParts, QuantizedLayer, layer_options
from lightning_quant.graph.rereads import insert_rereads
from lightning_quant.graph.trace import trace
from lightning_quant.layers.parameters import read_from_children
from lightning_quant.layers.placement import place
from lightning_quant.numerics.adjustments import ChannelScale
from lightning_quant.numerics.decomposed import define_operators
from lightning_quant.numerics.noise import alike, signal_to_noise
from lightning_quant.runtimes._reasons import first_line
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import clone, evaluation_mode, resolve, route

_TOLERANCE_DB = 3.0
_ENOUGH_DB = 40.0


def convert(prepared: Prepared, *, static_sizes: bool = True) -> nn.Module:
    """Return the QDQ module of a trained or calibrated model, in eval mode, with the call signature of the original.

    Args:
        prepared: detached or attached.
        static_sizes: whether all dimensions but the batch stay as captured, which global pooling can make use of.

    Raises:
        CalibrationError: an edge was never observed; the message names it.
    """
    define_operators()
    prepared.ranges.check()
    # Weights that hooks compute, as pruning does, are those of the last call until there is another.
    args, kwargs = prepared.call()
    # In eval mode throughout: in training a look at a weight may change it, as spectral norm's power iteration does.
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluation_mode(prepared.root):
        prepared.root(*args, **kwargs)
        # What is converted has the layers that these weights, which may have been trained, are stored in.
        prepared.plan = prepared.stored_plan()
        return _convert(prepared, static_sizes=static_sizes)


def _convert(prepared: Prepared, *, static_sizes: bool) -> nn.Module:
    root = clone(prepared.root, unrouted=True)
    root.eval()
    converted: nn.Module = root
    graphs: list[BoundGraph] = []
    stored = dict(prepared.stored_layers())
    # Inner parts first: the graph around a part that cannot be traced calls it with what is in it.
    for path in sorted(prepared.islands, key=lambda path: -path.count(".") - bool(path)):
        island = prepared.islands[path]
        module = resolve(root, path)
        inside = {name: stored.pop(name) for name in [name for name in stored if _is_inside(name, path)]}
        bound = _convert_island(prepared, island, module, inside, static_sizes=static_sizes)
        if path:
            # Routed as in training: what the parent's own code asks of its child, class and attributes, stays true.
            route(module, bound)
            graphs.append(bound)
        else:
            converted = bound
    drop_unread(converted, [resolve(root, path) for path in prepared.islands if path])
    place(root, stored)
    return (InParts(converted, graphs) if graphs else converted).eval()


def _is_inside(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def check_agreement(prepared: Prepared, converted: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return by how many decibels the QDQ module agrees with the fake-quantized one on a call.

    Raises:
        ExportError: they are farther apart than the fake-quantized model is from float. (Both compute the same integers
            but for ties, which float32 sums in another order tip over.) Or the module does not run with integers in it.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluation_mode(prepared.root):
        float_output = prepared.root(*args, **kwargs)
        with prepared.attached("frozen"):
            simulated = prepared.root(*args, **kwargs)
        try:
            actual = converted(*args, **kwargs)
        except (RuntimeError, TypeError) as error:
            raise ExportError(
                f"Expected {type(prepared.root).__name__} to run with integer layers, but {first_line(error)}. Where "
                "its code takes gradients, which they do not pass, exclude them, or quantize a child without that "
                'code (`module="..."`).'
            ) from error
    agreement = signal_to_noise(*alike(simulated, actual))
    needed = min(signal_to_noise(*alike(float_output, simulated)) - _TOLERANCE_DB, _ENOUGH_DB)
    if not agreement >= needed:
        raise ExportError(
            f"Expected the converted model to agree with the fake-quantized one by {needed:.1f} dB, but got "
            f"{agreement:.1f} dB. Please report this with your model's plan."
        )
    return agreement


def _convert_island(
    prepared: Prepared, island: Island, module: nn.Module, stored: dict[str, nn.Module], *, static_sizes: bool
) -> BoundGraph:
    """Convert a traceable part; `stored` are layers of other recipes by their names in the whole module."""
    traced = trace(module, island.spec, island.tensors, set(island.opaque))
    graph = traced.graph
    nodes = {node.meta["key"]: node for node in graph.nodes if "key" in node.meta}
    insert_rereads(island, nodes)
    shield_float_layers(prepared, island, nodes, module)
    layers = _layers_put_in(prepared, island, module, graph, nodes)
    if static_sizes:
        for operator in island.plan.operators:
            if operator.kind == "global_avg_pool":
                _pool_with_static_window(nodes[operator.key])
    layers |= _edges_put_in(prepared, island, graph, nodes)
    for name, layer in layers.items():
        module.add_module(name, layer)
    for node in nodes.values():
        # Patterns of runtimes do not know them: behind one, XNNPACK takes no quantized convolution.
        if is_left_out(node, module):
            _drop(node)
    prefix = f"{island.path}." if island.path else ""
    place(module, {name.removeprefix(prefix): layer for name, layer in stored.items()})
    read_from_children(graph, module)
    renamed = clear_of_own_names(graph, module)
    graph_module = fx.GraphModule(module, with_any_names(graph))
    graph_module.graph.eliminate_dead_code()
    # Made anew it has what its graph reads, and nothing else.
    graph_module = fx.GraphModule(graph_module, graph_module.graph)
    for name in (*layers, *renamed):
        del module._modules[name]
    return BoundGraph(graph_module, island.signature, traced.output_spec)


def _layers_put_in(
    prepared: Prepared, island: Island, module: nn.Module, graph: fx.Graph, nodes: dict[str, fx.Node]
) -> dict[str, nn.Module]:
    """Write the operators in integers into a graph, and return the layers that it calls for them by name."""
    layers: dict[str, nn.Module] = {}
    for operator in island.plan.operators:
        if operator.weight:
            name = f"quantized_{len(layers)}"
            node = nodes[operator.key]
            layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            layers[name] = _convert_layer(prepared, operator, node, layer)
            if (border := border_of(layer)) is not None:
                _pad_before(graph, node, border, _quantizer(prepared, operator.reads[0]).grid)
            _replace_layer(graph, operator, nodes, name)
        for affine in operator.affine:
            _drop(nodes[affine.key], affine.position)
        if operator.activation and operator.quantized_output:
            _drop(nodes[operator.activation])
    return layers


def _edges_put_in(
    prepared: Prepared, island: Island, graph: fx.Graph, nodes: dict[str, fx.Node]
) -> dict[str, nn.Module]:
    """Write the rounding of edges into a graph, and return the quantizers that it calls for them by name."""
    quantizers: dict[str, nn.Module] = {}
    for edge in island.plan.edges:
        if edge.passed:
            continue
        quantizer = _quantizer(prepared, edge.identity, moved=not edge.observed)
        # A name of its own in the whole module: exporters may know no more than the last part of a path.
        quantizers[name := f"edge_{list(prepared.ranges.edges).index(edge.identity)}"] = quantizer
        pair = _insert_pair(graph, nodes[edge.key], name, quantizer.grid)
        if edge.identity in prepared.channels:
            _scale_channels(island, edge.key, prepared.channels[edge.identity].to(torch.device("cpu")), *pair)
    return quantizers


def _quantizer(prepared: Prepared, identity: str, *, moved: bool = False) -> EdgeQuantizer:
    """Return the quantizer of an edge; what was only moved is on the grid, and clipped to it, already."""
    scale, zero_point = prepared.ranges.parameters(identity)
    return EdgeQuantizer(identity, scale.item(), int(zero_point), prepared.ranges.grid_of(identity), clips=not moved)


@torch.no_grad()
def _convert_layer(prepared: Prepared, operator: Operator, node: fx.Node, layer: nn.Module | None) -> QuantizedLayer:
    """Fold BatchNorm into a layer and quantize it; node and layer have its strides, the prepared has its weights."""
    folded = prepared.folded(operator.identity)
    integers = prepared.weight_integers(operator.identity, folded).to(torch.int8)
    bias = folded.bias_integers.to(torch.int32)
    options = layer_options(node, operator, layer)
    tensors = (integers, folded.scale, bias, folded.bias_step)
    return QuantizedLayer(operator.kind, options, *(tensor.detach().cpu() for tensor in tensors))


def _pad_before(graph: fx.Graph, node: fx.Node, border: tuple[list[int], str], grid: tuple[Any, ...]) -> None:
    """Write the padding that a convolution carries out as one of its own, of a quantized tensor like its input."""
    qdq = torch.ops.quantized_decomposed
    with graph.inserting_before(node):
        padded = graph.call_function(F.pad, (ops.argument(node, 0, "input"), *border))
        padded.meta["key"] = node.meta["key"]
        quantized = graph.call_function(qdq.quantize_per_tensor.default, (padded, *grid))
        node.args, node.kwargs = (graph.call_function(qdq.dequantize_per_tensor.default, (quantized, *grid)),), {}


def _replace_layer(graph: fx.Graph, operator: Operator, nodes: dict[str, fx.Node], name: str) -> None:
    node = nodes[operator.key]
    node.args, node.op, node.target, node.kwargs = (ops.argument(node, 0, "input"),), "call_module", name, {}
    if operator.batch_norm:
        _drop(nodes[operator.batch_norm])
    if operator.batch_norm and not operator.moved:
        nodes[operator.batch_norm] = node
        if operator.output == operator.batch_norm:
            nodes[operator.output] = node


def _drop(node: fx.Node, position: int = 0) -> None:
    """Let readers of a node read its input: a clipping activation, say, that the range of its output takes over."""
    source = ops.argument(node, position, "input")
    node.replace_all_uses_with(source)
    node.meta["dropped"] = source


def _pool_with_static_window(node: fx.Node) -> None:
    """Write a global average as a window pool, which has an integer kernel where a mean over dimensions has none."""
    source = node.args[0]
    shape = ops.shape_of(source)[2:]
    if not shape:
        return
    keep = len(ops.shape_of(node)) == 2 + len(shape)
    name = f"avg_pool{len(shape)}d"
    with node.graph.inserting_before(node):
        pooled = node.graph.call_function(getattr(F, name), (source, tuple(shape)))
        pooled.meta = dict(node.meta)
        result = pooled if keep else node.graph.call_function(torch.flatten, (pooled, 1))
    node.replace_all_uses_with(result)
    node.meta["dropped"] = result


def _insert_pair(graph: fx.Graph, node: fx.Node, quantizer: str, grid: tuple[Any, ...]) -> tuple[fx.Node, fx.Node]:
    while "dropped" in node.meta:
        node = node.meta["dropped"]
    readers = list(node.users)
    with graph.inserting_after(node):
        quantized = graph.call_module(quantizer, (node,))
    with graph.inserting_after(quantized):
        dequantized = graph.call_function(
            torch.ops.quantized_decomposed.dequantize_per_tensor.default, (quantized, *grid)
        )
    for reader in readers:
        reader.replace_input_with(node, dequantized)
    return quantized, dequantized


def _scale_channels(island: Island, key: str, channels: ChannelScale, quantized: fx.Node, dequantized: fx.Node) -> None:
    """Scale where operators meet that know nothing of it: float ones that write the edge, and float ones that read it.

    Those in integers have the factors in their weights, or pass them on.
    """
    operators = island.plan.operators
    passed_on = {edge.key for edge in island.plan.edges if edge.group != edge.key or not edge.observed}
    if key not in passed_on and not any(operator.output == key for operator in operators):
        source = quantized.args[0]
        with quantized.graph.inserting_before(quantized):
            scaled = quantized.graph.call_function(channels.to_grid, (source,))
        quantized.replace_input_with(source, scaled)  # type: ignore[arg-type]
    on_grid = passed_on | {operator.key for operator in operators} | {operator.pad for operator in operators}
    readers = [reader for reader in dequantized.users if reader.meta.get("key") not in on_grid]
    if readers:
        with dequantized.graph.inserting_after(dequantized):
            unscaled = dequantized.graph.call_function(channels.from_grid, (dequantized,))
        for reader in readers:
            reader.replace_input_with(dequantized, unscaled)
