"""Weights of at most four bits in an ONNX file: stored in four, and turned into the int8 of the kernels by a Cast.

ONNX Runtime (1.31) and OpenVINO (2026.4) carry the Cast out when a session starts, and run the same integer kernels as
over int8 weights, to the bit: neither has kernels that compute in four bits on the CPU. A DequantizeLinear of int4
itself keeps ONNX Runtime's convolutions in float.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_quant.graph.qdq import QuantizedLayer

# Below it the node that casts is larger than what it saves.
_LEAST_VALUES = 256


def has_four_bits(module: nn.Module) -> bool:
    """Tell whether a layer of a module has a weight that four bits hold."""
    return any(_fits(layer.weight) for layer in module.modules() if isinstance(layer, QuantizedLayer))


def _fits(weight: Any) -> bool:
    return weight.numel() >= _LEAST_VALUES and bool(((weight >= -8) & (weight <= 7)).all())


def store_in_four_bits(model: Any) -> None:
    """Store the int8 constants that are dequantized and that four bits hold as int4; the graph is changed."""
    import ml_dtypes
    import onnx_ir as ir

    for node in list(model.graph):
        if node.op_type != "DequantizeLinear":
            continue
        value: Any = node.inputs[0]
        constant = value.const_value
        if constant is None or constant.dtype != ir.DataType.INT8 or value.name not in model.graph.initializers:
            continue
        integers = constant.numpy()
        if integers.ndim < 2 or not _fits(torch.from_numpy(np.ascontiguousarray(integers))):
            continue
        tape = ir.tape.Tape()
        packed = ir.tensor(integers.astype(ml_dtypes.int4), dtype=ir.DataType.INT4, name=value.name)
        stored = tape.initializer(packed, name=f"{value.name}_int4")
        cast = tape.op("Cast", [stored], {"to": ir.DataType.INT8})
        cast.shape, cast.dtype = value.shape, ir.DataType.INT8
        model.graph.insert_before(next(use.node for use in value.uses()), tape.nodes)
        model.graph.register_initializer(stored)
        value.replace_all_uses_with(cast)
        model.graph.initializers.pop(value.name)
