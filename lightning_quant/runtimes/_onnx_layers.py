"""What quantized layers are in ONNX: standard operators (opset 20), in place of `torch.ops.lightning_quant.*`.

Found with ONNX Runtime 1.31 on a Xeon with VNNI and AMX, one thread, 192 rows of 768 features, milliseconds for 3,072
and 50,257 outputs: float 4.9 and 98; rows quantized by standard operators before MatMulInteger 1.0 and 27.5;
DynamicQuantizeMatMul, one activation scale for the tensor, 0.7 and 17.5; MatMulNBits with 8 bits 9.1 and 240, at int8
accuracy level 4.2 and 76 (it is made for single rows). Weight-only: Cast before MatMul 5.4 and 99, DequantizeLinear 5.7
and 95, but sessions make MatMulNBits of that, which rounds activations: 2.8 dB beside one loud feature. Transpose of
a constant, which lets an embedding and an output layer share one stored weight, is folded when a session starts. LSTMs
with weights that are cast and scaled are as fast as float ones, since that is folded, too.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

# onnx.TensorProto.DataType
_FLOAT, _UINT8, _INT32, _INT64 = 1, 2, 6, 7
# ONNX's order of the gates by PyTorch's: LSTM i f g o to i o f g, GRU r z n to z r n.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}
# Sizes that values decide, and none that the caller does, in expressions of PyTorch's.
_FROM_DATA = re.compile(r"\bu\d+\b")


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the table that `torch.onnx.export` takes as `custom_translation_table`."""
    import lightning_quant.layers  # noqa: F401

    ours = torch.ops.lightning_quant
    return {
        ours.linear_dynamic.default: _linear_dynamic,
        ours.linear_weight_only.default: _linear_weight_only,
        ours.recurrent.default: _recurrent,
        ours.grouped_product.default: _grouped_product,
    }


def _opset() -> Any:
    from onnxscript import opset20

    return opset20


def _linear_dynamic(x: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
    """Rows as x = step * (q - 127) + offset with q in [0, 254], the grid of `layers.kernels.linear_dynamic`.

    Unsigned, since kernels take unsigned rows and signed weights.
    """
    op = _opset()
    last = op.Constant(value_ints=[-1])
    low, high = op.ReduceMin(x, last), op.ReduceMax(x, last)
    if _may_have_no_rows(x):
        # ONNX Runtime 1.31 reduces (0, features) to itself.
        start, end = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
        low, high = (op.Slice(extreme, start, end, last) for extreme in (low, high))
    smallest = op.Constant(value_float=torch.finfo(torch.float32).tiny)
    # Scaled before they are added: the range of a row may be wider than float32.
    levels, half = op.Constant(value_float=1 / 254), op.Constant(value_float=0.5)
    step = op.Max(op.Sub(op.Mul(high, levels), op.Mul(low, levels)), smallest)
    middle = op.Add(op.Mul(high, half), op.Mul(low, half))
    number = op.Round(op.Div(middle, step))
    offset = op.Where(op.IsInf(number), middle, op.Mul(number, step))
    one, zero_point = op.Constant(value_float=1.0), op.Cast(op.Constant(value_int=127), to=_UINT8)
    integers = op.QuantizeLinear(op.Div(op.Sub(x, offset), step), one, zero_point)
    sums = op.MatMulInteger(integers, op.Transpose(weight, perm=[1, 0]), zero_point)
    weight_sums = op.ReduceSum(op.Cast(weight, to=_INT32), op.Constant(value_ints=[-1]), keepdims=0)
    product = op.Mul(op.Mul(op.Cast(sums, to=_FLOAT), scale), step)
    result = op.Add(product, op.Mul(offset, op.Mul(op.Cast(weight_sums, to=_FLOAT), scale)))
    return result if bias is None else op.Add(result, bias)


def _may_have_no_rows(x: Any) -> bool:
    """Tell whether the data decides how many rows there are, as for an expert of a mixture: PyTorch names that u0."""
    return any(_FROM_DATA.search(str(size)) for size in x.shape or () if not isinstance(size, int))


def _linear_weight_only(x: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
    op = _opset()
    if len(scale.shape) == 2:
        return _linear_int4(x, weight, scale, bias)
    # Not DequantizeLinear: with MatMul, sessions make MatMulNBits of it at int8 accuracy, which rounds the activations.
    result = op.Mul(op.MatMul(x, op.Cast(op.Transpose(weight, perm=[1, 0]), to=_FLOAT)), scale)
    return result if bias is None else op.Add(result, bias)


def _linear_int4(x: Any, packed: Any, scale: Any, bias: Any) -> Any:
    op = _opset()
    out_features, groups = (int(size) for size in scale.shape)
    group_size = int(packed.shape[1]) * 2 // groups
    unsigned = op.Mod(op.Add(op.Cast(packed, to=_INT32), _integers(op, 256)), _integers(op, 256))
    shape = op.Constant(value_ints=[out_features, groups, group_size // 2])
    blocks = op.Reshape(op.Cast(unsigned, to=_UINT8), shape)
    size = {"K": groups * group_size, "N": out_features, "bits": 4, "block_size": group_size}
    result = _matmul_nbits()(x, blocks, op.Reshape(scale, op.Constant(value_ints=[-1])), **size)
    return result if bias is None else op.Add(result, bias)


def _grouped_product(x: Any, weight: Any, ends: Any) -> Any:
    """Cut the rows by group, multiply each part by its weight, and join the results."""
    op = _opset()
    first, after = op.Constant(value_ints=[0]), op.Cast(ends, to=_INT64)
    start, products = first, []
    for group in range(int(weight.shape[0])):
        place = op.Constant(value_ints=[group])
        end = op.Gather(after, place, axis=0)
        products.append(op.MatMul(op.Slice(x, start, end, first), op.Squeeze(op.Gather(weight, place, axis=0), first)))
        start = end
    return op.Concat(*products, axis=0)


def _integers(op: Any, value: int) -> Any:
    return op.Cast(op.Constant(value_int=value), to=_INT32)


def _matmul_nbits() -> Any:
    """Return ONNX Runtime's contributed operator, of which onnxscript has no schema.

    Source: microsoft/onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits, since version 1.
    """
    from onnx.defs import OpSchema
    from onnxscript import values

    formal, integer = OpSchema.FormalParameter, OpSchema.AttrType.INT
    schema = OpSchema(
        "MatMulNBits",
        "com.microsoft",
        1,
        inputs=[formal("A", "T1"), formal("B", "T2"), formal("scales", "T1")],
        outputs=[formal("Y", "T1")],
        type_constraints=[("T1", ["tensor(float)"], ""), ("T2", ["tensor(uint8)"], "")],
        attributes=[OpSchema.Attribute(name, integer, required=True) for name in ("K", "N", "bits", "block_size")],
    )
    return values.Op(values.Opset("com.microsoft", 1), "MatMulNBits", schema)


def _recurrent(
    x: Any,
    state: Sequence[Any],
    weights: Sequence[Any],
    biases: Sequence[Any],
    mode: str,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    lengths: Any = None,
) -> Any:
    op = _opset()
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    hidden = int(weights[0].shape[0]) // len(_GATES[mode])
    order = op.Constant(value_ints=[gate * hidden + row for gate in _GATES[mode] for row in range(hidden)])
    sequence = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
    initial = [[tensor] if num_layers == 1 else op.Split(tensor, axis=0, num_outputs=num_layers) for tensor in state]
    after: list[list[Any]] = [[] for _ in range(2 if mode == "LSTM" else 1)]
    ends = None if lengths is None else op.Cast(lengths, to=_INT32)
    for layer, begin in enumerate(zip(*initial, strict=True) if state else [()] * num_layers):
        places = range(layer * directions, (layer + 1) * directions)
        own = [weights[place * each : (place + 1) * each] for place in places]
        # The state before its projection is what the gates see of it: both products by constants are one.
        sides = [[w[0] for w in own], [w[1] if each == 2 else op.MatMul(w[1], w[2]) for w in own]]
        bias = [_both_biases(op, biases[2 * place : 2 * place + 2], order) for place in places] if biases else []
        if each == 3 and begin:
            (sequence, sides[0]), begin = _with_state(op, sequence, begin[0], own, ends), (None, begin[1])
        stacked = [_stack(op, [op.Gather(w, order, axis=0) for w in side]) for side in sides]
        inputs = (sequence, *stacked, _stack(op, bias) if bias else None, ends, *begin)
        output, *end = _node(op, mode, inputs, hidden, directions)
        if each == 3:
            output, end[0] = _projected(op, own, output, end[0])
        sequence = op.Reshape(op.Transpose(output, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
        for kept, tensor in zip(after, end, strict=True):
            kept.append(tensor)
    result = op.Transpose(sequence, perm=[1, 0, 2]) if batch_first else sequence
    return [result, *(op.Concat(*kept, axis=0) if num_layers > 1 else kept[0] for kept in after)]


def _projected(op: Any, weights: list[Any], *states: Any) -> list[Any]:
    projection = _stack(op, [op.Transpose(own[2], perm=[1, 0]) for own in weights])
    return [op.MatMul(state, projection) for state in states]


def _with_state(op: Any, x: Any, state: Any, weights: list[Any], ends: Any) -> tuple[Any, list[Any]]:
    """Hand a projected state over as further features of the step at which a direction begins, zero at all others.

    ONNX's state is the one before the projection, of which there may be many. The gates see the same of features that
    are multiplied by the weights of the state.

    Args:
        op: the opset.
        x: `(time, batch, features)`.
        state: `(directions, batch, projected)`.
        weights: of each direction: of the input, of the state, and of the projection.
        ends: `(batch,)`, the lengths; None where all sequences are whole.

    Returns:
        the sequence, and for each direction the weights of its features.
    """
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    length = op.Squeeze(op.Shape(x, start=0, end=1))
    step = op.Unsqueeze(op.Range(zero, length, one), op.Constant(value_ints=[1, 2]))
    last = op.Sub(length if ends is None else op.Cast(ends, to=_INT64), one)
    first = op.Unsqueeze(last, op.Constant(value_ints=[0, 1] if ends is None else [1]))
    parts, sides = [x], []
    for place, own in enumerate(weights):
        begins = op.Equal(step, zero if place == 0 else first)
        parts.append(op.Where(begins, op.Gather(state, op.Constant(value_ints=[place]), axis=0), 0.0))
        others = [own[1] if other == place else op.Mul(own[1], 0.0) for other in range(len(weights))]
        sides.append(op.Concat(own[0], *others, axis=1))
    return op.Concat(*parts, axis=2), sides


def _both_biases(op: Any, biases: Sequence[Any], order: Any) -> Any:
    return op.Concat(*(op.Gather(bias, order, axis=0) for bias in biases), axis=0)


def _stack(op: Any, tensors: list[Any]) -> Any:
    expanded = [op.Unsqueeze(tensor, op.Constant(value_ints=[0])) for tensor in tensors]
    return op.Concat(*expanded, axis=0) if len(expanded) > 1 else expanded[0]


def _node(op: Any, mode: str, inputs: tuple[Any, ...], hidden: int, directions: int) -> Any:
    options = {"hidden_size": hidden, "direction": "bidirectional" if directions == 2 else "forward"}
    if mode == "LSTM":
        return op.LSTM(*inputs, **options)
    if mode == "GRU":
        return op.GRU(*inputs, linear_before_reset=1, **options)
    activation = "Tanh" if mode == "RNN_TANH" else "Relu"
    return op.RNN(*inputs, activations=[activation] * directions, **options)
