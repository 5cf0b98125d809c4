"""QDQ graphs as XNNPACK reads them, and what a lowered program says of its operators."""

import json
import re
from importlib import resources
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_quant.machine.disk import scratch_folder

# Follows the names of operators that compute in integers.
INTEGER = "_int8"


def as_xnnpack_reads_it(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Write a QDQ graph with int8 activations and float biases; every value stays what it was."""
    ops = torch.ops.quantized_decomposed
    for node in list(graph_module.graph.nodes):
        pair = node.target in (ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default)
        if pair and node.args[5] is torch.uint8:
            source, scale, zero_point, low, high, _ = node.args
            node.args = (source, scale, zero_point - 128, low - 128, high - 128, torch.int8)
        elif node.target is ops.dequantize_per_channel.default and node.args[6] is torch.int32:
            integers, step = (_fetch(graph_module, argument.target) for argument in node.args[:2])
            name = f"bias_of_{node.name}"
            graph_module.register_buffer(name, integers.float() * step)
            with graph_module.graph.inserting_before(node):
                node.replace_all_uses_with(graph_module.graph.get_attr(name))
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        _multiply_rows(node)
    for node in list(graph_module.graph.nodes):
        if node.target is ops.dequantize_per_tensor.default:
            _give_each_reader_its_own(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _multiply_rows(linear: fx.Node) -> None:
    """Move the rows of an integer linear layer, flattened before and unflattened behind it, in integers.

    XNNPACK takes a layer directly between quantized tensors alone; those of transformers were computed in float.
    """
    ops, flatten = torch.ops.quantized_decomposed, linear.args[0]
    unflatten = next(iter(linear.users), None)
    quantize = None if unflatten is None else next(iter(unflatten.users), None)
    before = flatten.args[0] if isinstance(flatten, fx.Node) and flatten.args else None
    if not (isinstance(before, fx.Node) and before.target is ops.dequantize_per_tensor.default):
        return
    alone = unflatten is not None and len(linear.users) == len(unflatten.users) == 1
    if not alone or quantize is None or quantize.target is not ops.quantize_per_tensor.default:
        return
    _round_behind(flatten, before.args[1:])  # type: ignore[arg-type]
    _round_behind(linear, quantize.args[1:])


def _round_behind(node: fx.Node, grid: tuple[Any, ...]) -> None:
    ops = torch.ops.quantized_decomposed
    with node.graph.inserting_after(node):
        quantized = node.graph.call_function(ops.quantize_per_tensor.default, (node, *grid))
    with node.graph.inserting_after(quantized):
        rounded = node.graph.call_function(ops.dequantize_per_tensor.default, (quantized, *grid))
    node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not quantized)


def _give_each_reader_its_own(node: fx.Node) -> None:
    """Copy a dequantize node for every reader but the first: partitions that share one depend on each other."""
    for reader in list(node.users)[1:]:
        with node.graph.inserting_before(reader):
            reader.replace_input_with(node, node.graph.node_copy(node))


def restore_bounds(program: Any) -> None:
    """Tell the symbols of a lowered program their bounds again, without which it plans memory for about 15 samples."""
    for node in program.graph.nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, tuple | list) else [values]:
            for size in value.shape if isinstance(value, Tensor) else ():
                if isinstance(size, torch.SymInt):
                    size.node.shape_env.var_to_range.update(program.range_constraints)


def _fetch(root: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(root.get_submodule(owner) if owner else root, attribute)


def xnnpack_nodes(data: bytes) -> list[str]:
    """Return the operators of a delegate, from its flatbuffer by the schema that the wheel carries."""
    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(data[: XNNHeader.EXPECTED_LENGTH])
    with scratch_folder() as folder:
        schema, binary = folder / "schema.fbs", folder / "graph.bin"
        schema.write_bytes(resources.files(serialization).joinpath("schema.fbs").read_bytes())
        binary.write_bytes(data[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
        _flatc_decompile(str(folder), str(schema), str(binary), ["--raw-binary"])
        # Bounds of activations may be infinite, which JSON has no numbers for.
        graph = json.loads(re.sub(r":\s*[-+]?(inf|nan)\w*", ": null", (folder / "graph.json").read_text()))
    values = [value["xvalue_union"] for value in graph["xvalues"]]
    integers = {value["tensor_value"]["id_out"] for value in values if "tensor_value" in value}
    return [
        node["xnode_union_type"] + (INTEGER if node["xnode_union"].get("output_id") in integers else "")
        for node in graph["xnodes"]
    ]
