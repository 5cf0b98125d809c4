"""Which share of a model runs and is stored in integers, read from what the engine itself makes of the file.

Multiply-adds are those of layers with weights, of products of activations and of recurrent layers, at the sizes of one
call; weights are constants of two dimensions or more.
"""

import json
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

# Where an operator of ONNX Runtime takes its weights, or its second factor.
_ORT_FLOAT = {"Conv": 1, "FusedConv": 1, "ConvTranspose": 1, "Gemm": 1, "FusedGemm": 1, "MatMul": 1, "FusedMatMul": 1}
_ORT_INTEGER = {"QLinearConv": 3, "QGemm": 3, "QLinearMatMul": 3, "MatMulIntegerToFloat": 1, "MatMulInteger": 1}
_ORT_INTEGER |= {"ConvInteger": 1, "DynamicQuantizeMatMul": 1}
_ORT_RECURRENT = {"LSTM": 0, "GRU": 0, "RNN": 0, "DynamicQuantizeLSTM": 1}
_OPENVINO = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "LSTMSeq", "GRUSeq", "RNNSeq")


class Shares(NamedTuple):
    """Shares in [0, 1].

    Attributes:
        computed: of the multiply-adds, those of integer operators.
        stored: of the weights, those of at most eight bits.
    """

    computed: float
    stored: float


def onnxruntime_shares(path: Path, inputs: Tensor) -> Shares:
    """Read the shares from the profile of one call, and from the file's constants."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.log_severity_level, options.intra_op_num_threads = True, 3, 1
    # Packed weights are no inputs in the profile.
    options.add_session_config_entry("session.disable_prepacking", "1")
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
    calls = [event["args"] for event in events if "output_type_shape" in event.get("args", {})]
    counted = [(_ort_multiply_adds(call), _is_integer(call["op_name"])) for call in calls]
    graph = onnx.load(path).graph
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer]
    return Shares(_share(counted), _share((a.size, a.dtype.itemsize == 1) for a in arrays if a.ndim > 1))


def openvino_shares(model: Any, inputs: Tensor) -> Shares:
    """Read the shares from the layers of the compiled model, and from the model's constants."""
    import openvino

    constants = [op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]
    indices = (openvino.Type.i64, openvino.Type.i32)
    stored = [
        (math.prod(op.get_output_shape(0)), op.get_output_element_type(0).size == 1)
        for op in constants
        if len(op.get_output_shape(0)) > 1 and op.get_output_element_type(0) not in indices
    ]
    # Which kernels run tells the model that is called, which may be another than with fixed sizes; those tell shapes.
    called = _compiled(model)
    called(inputs.numpy())
    kernels = {_name(layer): _is_in_integers(layer) for layer in called.get_runtime_model().get_ordered_ops()}
    fixed = model.clone()
    fixed.reshape(list(inputs.shape))
    layers = _compiled(fixed).get_runtime_model().get_ordered_ops()
    counted = [
        (number, kernels.get(_name(layer), _is_in_integers(layer)))
        for layer in layers
        if (number := _openvino_multiply_adds(layer))
    ]
    return Shares(_share(counted), _share(stored))


def _compiled(model: Any) -> Any:
    import openvino

    # Snippets put several products into one layer, which does not tell what each of them is.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "SNIPPETS_MODE": "DISABLE"}
    return openvino.Core().compile_model(model, "CPU", settings)


def _information(layer: Any, key: str) -> str:
    information = layer.get_rt_info()
    return information[key].astype(str) if key in information else ""


def _name(layer: Any) -> str:
    """Return the name of the operator that a layer was first of."""
    return _information(layer, "originalLayersNames").partition(",")[0].partition("/")[0]


def _is_in_integers(layer: Any) -> bool:
    return _information(layer, "primitiveType").lower().endswith("_i8")


def _is_integer(kind: str) -> bool:
    return kind in _ORT_INTEGER or kind == "DynamicQuantizeLSTM"


def _ort_multiply_adds(call: dict[str, Any]) -> int:
    kind = call["op_name"]
    shapes = [next(iter(shape.values())) for shape in call["input_type_shape"]]
    if kind in _ORT_RECURRENT:
        steps, batch, _ = shapes[0]
        return steps * batch * (math.prod(shapes[1]) + math.prod(shapes[2]))
    position = _ORT_FLOAT.get(kind, _ORT_INTEGER.get(kind))
    if position is None:
        return 0
    # Scales and zero points of integer operators stand between, those of one number as shapes without sizes.
    result, factor = math.prod(next(iter(call["output_type_shape"][0].values()))), shapes[position]
    if kind == "ConvTranspose":
        return math.prod(shapes[0]) * math.prod(factor[1:])
    if "Conv" in kind:
        return result * math.prod(factor[1:])
    return result * shapes[0][-1]


def _openvino_multiply_adds(layer: Any) -> int:
    kind = _information(layer, "layerType")
    if kind not in _OPENVINO:
        return 0
    result, first = math.prod(layer.get_output_shape(0)), list(layer.get_input_shape(0))
    if kind.endswith("Seq"):
        sizes = [math.prod(layer.get_input_shape(index)) for index in range(layer.get_input_size())]
        return first[0] * first[1] * sum(sorted(sizes)[-2:])
    weights = list(layer.get_input_shape(1)) if layer.get_input_size() > 1 else []
    if kind == "Convolution":
        return int(result * math.prod(weights) // max(layer.get_output_shape(0)[1], 1))
    if kind == "Deconvolution":
        return int(math.prod(first) * math.prod(weights) // max(first[1], 1))
    return int(result * first[-1])


def _share(counted: Iterable[tuple[int, bool]]) -> float:
    every = [(int(np.int64(number)), chosen) for number, chosen in counted]
    total = sum(number for number, _ in every)
    return sum(number for number, chosen in every if chosen) / total if total else 0.0
