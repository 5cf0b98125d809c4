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


def reduce_apart(model: Any) -> None:
    """Keep apart what reduces one of three dimensions and what reads it.

    OpenVINO computes scales, shifts and rounding in the kernel that reduces, and takes them for those of another
    dimension where there are three: a mean over the tokens of `(N, tokens, C)` integers, or a rounded maximum over the
    places of `(N, C, places)`, is mostly noise. So a mean or a sum becomes a product with ones, and a maximum or
    minimum over the last dimension one of itself and itself.
    """
    for node in list(model.graph):
        axis = _axis(node)
        if axis is None:
            continue
        tape = ir.tape.Tape()
        if node.op_type in ("ReduceMax", "ReduceMin"):
            alone = tape.op(node.op_type, list(node.inputs), {"keepdims": _keeps(node)})
            result = tape.op(node.op_type.removeprefix("Reduce"), [alone, alone])
        else:
            result = _product(tape, node, axis)
        model.graph.insert_before(node, tape.nodes)
        for value in tape.initializers:
            model.graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _axis(node: Any) -> int | None:
    """Return which of three dimensions a node reduces to what its reader's kernel would get wrong, else None."""
    if node.op_type not in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin") or len(node.inputs) < 2:
        return None
    shape, axes = node.inputs[0].shape, node.inputs[1] and node.inputs[1].const_value
    if shape is None or len(shape) != 3 or axes is None or axes.numpy().size != 1:
        return None
    # Norms keep the dimension, and have kernels of their own.
    sums = node.op_type in ("ReduceMean", "ReduceSum")
    if _keeps(node) and not (sums and _is_dequantized(node.inputs[0])):
        return None
    axis = int(axes.numpy().item()) % 3
    return axis if axis == 2 or (axis == 1 and sums) else None


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
