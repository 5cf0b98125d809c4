"""Operators of an ONNX graph that move values: on integers where ONNX Runtime would move what those stand for.

ONNX Runtime (1.31) does so by itself for most of them, but not for Pad, Gather and GatherND, nor for a Concat of parts
of one tensor or a Split of which one part is quantized: there it dequantizes, moves floats, and quantizes again. All of
them have kernels for integers. To read a shape it dequantizes, too.
"""

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir

# Larger than any size.
_END = 2**62
_NUMBERS = itertools.count()
_LEFT_IN_FLOAT = frozenset({"Pad", "Gather", "GatherND", "Concat", "Split"})
_MOVING = _LEFT_IN_FLOAT | {"Slice", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Tile"}


def move_in_integers(model: Any) -> None:
    """Write `QuantizeLinear(move(DequantizeLinear(x)))` as `move(x)` where both have the same grid."""
    for node in list(model.graph):
        producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if producer is None:
            continue
        if node.op_type == "QuantizeLinear":
            chain = _chain(producer, node)
            if any(_is_left_in_float(moving) for moving in chain):
                _move(model.graph, chain, node)
        elif node.op_type == "Shape" and producer.op_type == "DequantizeLinear":
            _read_integers(model.graph, node, 0)


def for_onnxruntime(model: Any) -> None:
    """Let ONNX Runtime compute in integers what has integer kernels."""
    move_in_integers(model)
    keep_integer_products(model)
    keep_results_apart(model)


def keep_results_apart(model: Any) -> None:
    """Copy results of the graph that a Transpose in it reads, too.

    ONNX Runtime (1.31) moves a quantizer from behind a Transpose to before it without a look at whether what is rounded
    there is a result: states that an LSTM returns had 44 dB where a layer of integers read them.
    """
    for index, result in enumerate(model.graph.outputs):
        if result.producer() is not None and any(use.node.op_type == "Transpose" for use in result.uses()):
            tape = ir.tape.Tape()
            copy = tape.op("Identity", [result])
            copy.type, copy.shape = result.type, result.shape
            model.graph.extend(tape.nodes)
            model.graph.outputs[index] = copy


def keep_integer_products(model: Any) -> None:
    """Write a ReLU behind an integer product that answers in float as a maximum, which is the same.

    ONNX Runtime (1.31) fuses the two before it looks for integers, and then computes both in float.
    """
    for node in list(model.graph):
        product = node.inputs[0].producer() if node.op_type == "Relu" else None
        if product is None or product.op_type != "Gemm" or len(product.outputs[0].uses()) > 1:
            continue
        if all(_is_dequantized(value) for value in product.inputs[:2]):
            tape = ir.tape.Tape()
            name = f"zero_{next(_NUMBERS)}"
            zero = tape.initializer(ir.tensor(np.zeros((), node.inputs[0].dtype.numpy()), name=name), name=name)
            made = tape.op("Max", [node.inputs[0], zero])
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [made])
            model.graph.register_initializer(zero)


def _is_dequantized(value: Any) -> bool:
    return value is not None and value.producer() is not None and value.producer().op_type == "DequantizeLinear"


def _read_integers(graph: Any, node: Any, index: int) -> None:
    """Let a node read what its input is dequantized from."""
    dequantize = node.inputs[index].producer()
    node.replace_input_with(index, dequantize.inputs[0])
    if not dequantize.outputs[0].uses() and not dequantize.outputs[0].is_graph_output():
        graph.remove(dequantize, safe=True)


def _move(graph: Any, chain: list[Any], quantize: Any) -> None:
    integers = quantize.outputs[0]
    for node in chain:
        for index in _moved(node):
            producer = node.inputs[index].producer()
            if producer.op_type == "DequantizeLinear":
                _read_integers(graph, node, index)
        if node.op_type == "Pad" and _mode(node) == "constant":
            node.resize_inputs(max(3, len(node.inputs)))
            # The integer that stands for zero.
            node.replace_input_with(2, quantize.inputs[2])
        for value in node.outputs:
            value.dtype = integers.dtype
    chain[0].name = quantize.name
    integers.replace_all_uses_with(quantize.inputs[0])
    graph.remove(quantize, safe=True)


def _chain(last: Any, quantize: Any) -> list[Any]:
    """Return the operators between tensors of a grid and a quantizer to the same one, the last one first; else nothing.

    All of them move values, and none has a reader outside.
    """
    chain, left = [], [last]
    while left:
        node = left.pop()
        if node.op_type not in _MOVING or not _pads_zero(node):
            return []
        chain.append(node)
        for producer in (node.inputs[index].producer() for index in _moved(node)):
            if producer is None or (producer.op_type == "DequantizeLinear" and not _same_grid(producer, quantize)):
                return []
            if producer.op_type != "DequantizeLinear" and producer not in chain + left:
                left.append(producer)
    inside = {*chain, quantize}
    outputs = [value for node in chain for value in node.outputs]
    if any(value.is_graph_output() or {use.node for use in value.uses()} - inside for value in outputs):
        return []
    return chain if len(quantize.inputs[0].uses()) == 1 else []


def _is_left_in_float(node: Any) -> bool:
    """Tell whether ONNX Runtime would move floats; it joins quantized tensors itself."""
    if node.op_type == "Concat":
        return any(value.producer().op_type != "DequantizeLinear" for value in node.inputs)
    return node.op_type in _LEFT_IN_FLOAT


def _moved(node: Any) -> range:
    """Return the positions of the inputs whose values a node moves."""
    return range(len(node.inputs) if node.op_type == "Concat" else 1)


def _same_grid(one: Any, other: Any) -> bool:
    grids = [[value.const_value for value in node.inputs[1:]] for node in (one, other)]
    return all(
        a is not None and b is not None and a.dtype == b.dtype and a.numpy().tolist() == b.numpy().tolist()
        for a, b in zip(*grids, strict=True)
    )


def _mode(node: Any) -> str:
    attribute = node.attributes.get("mode")
    return "constant" if attribute is None else attribute.as_string()


def _pads_zero(node: Any) -> bool:
    """Tell whether a padding, if it is one, has no value of its own but zero."""
    if node.op_type != "Pad" or _mode(node) != "constant" or len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    value = node.inputs[2].const_value
    return value is not None and not value.numpy().any()


def pad_by_joining(model: Any) -> None:
    """Write padding with values of the other side, which OpenVINO does not know, as a Concat of slices."""
    for node in list(model.graph):
        if node.op_type != "Pad" or _mode(node) != "wrap":
            continue
        amounts = node.inputs[1].const_value.numpy().tolist()
        given = node.inputs[3].const_value.numpy().tolist() if len(node.inputs) > 3 else range(len(amounts) // 2)
        tape = ir.tape.Tape()
        padded = node.inputs[0]
        for place, axis in enumerate(given):
            before, after = amounts[place], amounts[place + len(amounts) // 2]
            parts = [padded]
            if before:
                parts.insert(0, _sliced(tape, padded, -before, _END, axis))
            if after:
                parts.append(_sliced(tape, padded, 0, after, axis))
            padded = tape.op("Concat", parts, {"axis": axis}) if len(parts) > 1 else padded
        model.graph.insert_before(node, tape.nodes)
        for value in tape.initializers:
            model.graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(padded, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _sliced(tape: Any, value: Any, start: int, end: int, axis: int) -> Any:
    bounds = [tape.initializer(ir.tensor([number]), name=f"slice_{next(_NUMBERS)}") for number in (start, end, axis)]
    return tape.op("Slice", [value, *bounds])
