"""Operators of an ONNX graph that OpenVINO 2026.4 does not know or computes wrongly, in forms that it gets right."""

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir

from lightning_quant.runtimes._onnx_moves import pad_by_joining

_NUMBERS = itertools.count()


def suit_openvino(model: Any) -> None:
    """Rewrite what OpenVINO would refuse or compute wrongly; the graph is changed."""
    pad_by_joining(model)
    reduce_apart(model)
    keep_slices(model)


def keep_slices(model: Any) -> None:
    """Put a maximum of itself and itself behind a slice that is gathered from: OpenVINO drops it, and refuses that."""
    for node in list(model.graph):
        source = node.inputs[0].producer() if node.op_type == "GatherElements" else None
        if source is not None and source.op_type == "Slice":
            tape = ir.tape.Tape()
            kept = tape.op("Max", [node.inputs[0], node.inputs[0]])
            kept.shape, kept.dtype = node.inputs[0].shape, node.inputs[0].dtype
            model.graph.insert_before(node, tape.nodes)
            node.replace_input_with(0, kept)


def reduce_apart(model: Any) -> None:
    """Keep apart what reduces and what reads it, where OpenVINO computes both in one kernel and gets it wrong.

    It rounds a maximum or minimum wrongly (14 to 25 dB), and takes scales and shifts behind any reduction that drops
    dimensions for those of another dimension (noise). A mean or a sum over one dimension of three becomes a product
    with ones; over inner ones of four, one that keeps them, since its own sums must not meet a maximum. Every other
    result becomes the maximum of itself and itself, which no kernel takes in.
    """
    for node in list(model.graph):
        if not node.op_type.startswith("Reduce") or len(node.inputs) < 2:
            continue
        tape = ir.tape.Tape()
        result = _kept_apart(tape, node, *_form(node))
        if result is None:
            continue
        model.graph.insert_before(node, tape.nodes)
        for value in tape.initializers:
            model.graph.register_initializer(value)
        result.shape, result.dtype = node.outputs[0].shape, node.outputs[0].dtype
        node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _form(node: Any) -> tuple[int, tuple[int, ...]]:
    """Return the number of dimensions and those that are reduced; none where they are not known."""
    shape, axes = node.inputs[0].shape, node.inputs[1] and node.inputs[1].const_value
    if shape is None or axes is None:
        return 0, ()
    return len(shape), tuple(sorted(int(axis) % len(shape) for axis in axes.numpy().flatten()))


def _kept_apart(tape: Any, node: Any, rank: int, axes: tuple[int, ...]) -> Any:
    """Return the result in a form that OpenVINO gets right, or None where it does so by itself."""
    keeps = _keeps(node)
    if node.op_type in ("ReduceMean", "ReduceSum"):
        # Norms keep the dimension, and have kernels of their own.
        if rank == 3 and axes in ((1,), (2,)) and (not keeps or _is_dequantized(node.inputs[0])):
            return _product(tape, node, axes[0])
        if rank == 4 and axes not in ((2, 3), (3,)) and not keeps:
            kept = tape.op(node.op_type, [_as_floats(tape, node), node.inputs[1]], {"keepdims": 1})
            return tape.op("Squeeze", [kept, node.inputs[1]])
        return None
    if keeps and node.op_type not in ("ReduceMax", "ReduceMin"):
        return None
    alone = tape.op(node.op_type, [_as_floats(tape, node), *node.inputs[1:]], dict(node.attributes))
    return tape.op("Max", [alone, alone])


def _as_floats(tape: Any, node: Any) -> Any:
    """Return what a node reduces, behind a maximum where it is dequantized: integers are not reduced before scaling."""
    values = node.inputs[0]
    return tape.op("Max", [values, values]) if _is_dequantized(values) else values


def _keeps(node: Any) -> int:
    keep = node.attributes.get("keepdims")
    return 1 if keep is None else keep.as_int()


def _is_dequantized(value: Any) -> bool:
    producer = value.producer()
    while producer is not None and producer.op_type in ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze"):
        producer = producer.inputs[0].producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _product(tape: Any, node: Any, axis: int) -> Any:
    """Return the mean or sum over the second or third of three dimensions as a product with ones."""
    values, size = node.inputs[0], node.inputs[0].shape[axis]
    divided = node.op_type == "ReduceMean"
    if isinstance(size, int):
        ones = _constant(tape, np.full(size, 1 / size if divided else 1, np.float32))
    else:
        length = tape.op("Shape", [values], {"start": axis, "end": axis + 1})
        ones = tape.op("Expand", [_constant(tape, np.ones(1, np.float32)), length])
        if divided:
            ones = tape.op("Div", [ones, tape.op("Cast", [length], {"to": ir.DataType.FLOAT})])
    product = tape.op("MatMul", [ones, values] if axis == 1 else [values, ones])
    return tape.op("Unsqueeze", [product, _constant(tape, np.array([axis]))]) if _keeps(node) else product


def _constant(tape: Any, values: np.ndarray) -> Any:
    return tape.initializer(ir.tensor(values), name=f"reduced_{next(_NUMBERS)}")
