"""Runtime `openvino`: QDQ models as OpenVINO's .xml and .bin, in a folder in which they find each other.

What the table says was tried on OpenVINO 2026.4, CPU, with layer types and primitives read from the compiled model:
- It fuses conv, residual add and ReLU into one integer kernel by itself, and rounds nothing between them, even where a
  quantizer stands there.
- A convolution may answer in float, and computes an activation that reads it in its own kernel before it rounds. With
  that answer rounded the activation is a layer of its own: three convolutions of 64 channels on 32x32 with two SiLU
  took 0.93 ms for 0.87 and were at 31.5 dB for 34.3; Hardswish, GELU, Mish, PReLU, LeakyReLU, Sigmoid are alike.
  Hardsigmoid and norms are layers of their own all the same.
- Of the two products of attention that with values runs in integers, between dequantize and quantize: 0.81 to 1.23
  times the time of float, at 26 to 34 dB (`examples/benchmarks/attention.py`).
- Weights stored as integers stay so in memory where they are scaled before their product (`_openvino_weights.py`);
  those of LSTMs and GRUs are integers in the file, and constants in float once it is compiled.
- Without a hint it computes float layers in bfloat16 on processors that have it; here it is told float32.
"""

import collections
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_quant.arguments.reading import opened
from lightning_quant.calls.call_checks import DTYPES
from lightning_quant.calls.calls import CapturedCall
from lightning_quant.calls.loaded import LoadedModule, beside, to_numpy
from lightning_quant.calls.signature import Signature, TensorInfo
from lightning_quant.errors import ArtifactError, ExportError, QuantizationError
from lightning_quant.graph.moves import MOVING
from lightning_quant.graph.named_edges import PREFIX
from lightning_quant.graph.plan import Operator
from lightning_quant.graph.table import OperatorTable
from lightning_quant.machine.disk import check_room, scratch_folder
from lightning_quant.numerics.grid import FEWER_THAN_8, INTEGERS_8
from lightning_quant.runtimes._onnx_export import export_onnx
from lightning_quant.runtimes._openvino_compiled import AS_SIMULATED, CPU_ONLY, compiled
from lightning_quant.runtimes._openvino_forced import run_forced
from lightning_quant.runtimes._openvino_graph import suit_openvino
from lightning_quant.runtimes._openvino_profile import operator_ms
from lightning_quant.runtimes._openvino_weights import compress_weights
from lightning_quant.runtimes._runtime import Runtime
from lightning_quant.runtimes._spelled_out import BagsSpelledOut
from lightning_quant.runtimes._standalone import numpy_inputs

_LAYER_REFUSALS = {
    "dynamic": "OpenVINO computes dynamic quantization in float. Use 'int8_weight_only' or 'int8'",
    "weight_only_4bit": "OpenVINO does not read the operator that carries out four bits. Use 'int8_weight_only'",
}
_FLOAT = "OpenVINO computes it in float on the CPU"
_IN_KERNEL = "OpenVINO computes it in float, within an integer convolution that it reads"
_TABLE = OperatorTable(
    weighted=frozenset({"conv1d", "conv2d", "conv3d", "linear"}),
    fused_activations=frozenset({"relu", "relu6", "hardtanh", "clamp"}),
    float_output=frozenset({"conv1d", "conv2d", "conv3d", "linear"}),
    own_scale=frozenset({"add", "cat", "avg_pool", "global_avg_pool"}),
    shared_scale=MOVING,
    reasons={
        **dict.fromkeys(("mul", "sub", "layer_norm", "group_norm", "softplus"), _FLOAT),
        **dict.fromkeys(("matmul", "attention"), "in integers it gains little time and costs accuracy"),
        **dict.fromkeys(("leaky_relu", "sigmoid", "hardswish", "gelu", "silu", "mish"), _IN_KERNEL),
        **dict.fromkeys(("elu", "prelu", "tanh"), _IN_KERNEL),
        **dict.fromkeys(("conv_transpose1d", "conv_transpose3d", "hardsigmoid", "selu"), _FLOAT),
        "conv_transpose2d": "its integer form, with a scale for each output channel of transposed weights, is not made",
        "softmax": "kept float: eight bits are too few for its tails",
    },
    grids=INTEGERS_8 | FEWER_THAN_8,
    fuses_add=True,
    adds_activated=True,
    moves_dequantization=True,
    padded_average="OpenVINO pads the integers with 0, whichever of them stands for zero",
)
_INTEGER = "_I8"
# Layer types of a compiled model that carry weights, by kind. The others, such as residual additions, are fused into
# them and no longer seen, or stand in float as "Eltwise" and "Pooling".
_INTEGER_OPERATORS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), ("Convolution" + _INTEGER,)),
    "linear": ("FullyConnected" + _INTEGER,),
    **dict.fromkeys(("add", "cat", "avg_pool", "global_avg_pool"), ()),
}
# What its bindings make of C++'s errors, also of messages that are no text, and of sizes that do not fit the memory.
_REFUSALS = (RuntimeError, TypeError, MemoryError, UnicodeDecodeError)


class OpenVinoModule(LoadedModule):
    """An OpenVINO model that is called like the module it came from; tensors come back on the device of the inputs.

    Attributes:
        compiled: the `openvino.CompiledModel`.

    Raises:
        ArtifactError: OpenVINO refuses the files, or their inputs and outputs are not those of the signature.
    """

    shared = ("compiled", "_requests")

    def __init__(
        self,
        path: Path,
        signature: Signature,
        *,
        threads: int | None = None,
        device: str = "CPU",
        by_default: bool = False,
    ) -> None:
        super().__init__(signature)
        try:
            _check_format(path)
            self.compiled = compiled(path, threads=threads, device=device, by_default=by_default)
            # Not the name of the tensor: what OpenVINO leaves out, such as `x - 0`, gives it a second one.
            names = [port.get_node().get_friendly_name() for port in self.compiled.inputs]
            _check_fits(self.compiled, signature, path)
        except _REFUSALS as error:
            raise ArtifactError(f"Expected {path} to be a model for OpenVINO, but it says: {_reason(error)}") from error
        if by_default:
            self.precision = self.compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.unread = frozenset(info.name for info in signature.inputs) - set(names)
        position = {info.name: index for index, info in enumerate(signature.inputs)}
        self._inputs = [(position[n], DTYPES[signature.inputs[position[n]].dtype]) for n in names]
        # A request holds the tensors of one call at a time, so each call borrows one that no other thread has.
        self._requests: collections.deque[Any] = collections.deque()

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run one inference; several threads may do so at once."""
        import openvino

        arrays = [to_numpy(tensors[index], dtype) for index, dtype in self._inputs]
        try:
            request = self._requests.pop()
        except IndexError:
            request = self.compiled.create_infer_request()
        try:
            # `infer` takes up to 50 microseconds to bind arrays itself.
            for index, array in enumerate(arrays):
                request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))
            # Shared outputs are overwritten by the next call, so they are copied.
            results = request.infer(share_outputs=True)
            outputs = [torch.from_numpy(output.copy()) for output in results.values()]
        except _REFUSALS as error:
            raise QuantizationError(
                "Expected inputs that the model can take, such as sequences that it has positions for, but "
                f"{_reason(error)}"
            ) from error
        finally:
            self._requests.append(request)
        return beside(tensors, outputs)


class OpenVino(Runtime):
    """OpenVINO on the CPU."""

    NAME = "openvino"
    REQUIRES = ("openvino", "onnx", "onnxscript")
    OPTIONS = ("threads", "device")
    MODEL_FILE = "model.xml"
    QUICK_FLOAT = True
    # Weights are stored in half precision; OpenVINO computes in the float32 that it is told.
    HALF_ARITHMETIC = False
    LAYERS_IN_GRAPHS = True
    LAYER_REFUSALS = _LAYER_REFUSALS
    TABLE = _TABLE
    INTEGER_OPERATORS = _INTEGER_OPERATORS
    KEEPS_EDGES = True

    def export(self, module: nn.Module, call: CapturedCall, path: Path) -> None:
        """Write a module as .xml with a .bin of the same name beside it.

        Raises:
            ExportError: PyTorch's exporter or OpenVINO refuses the module, with the reason.
        """
        import openvino

        with scratch_folder() as folder, BagsSpelledOut():
            onnx_path = folder / "model.onnx"
            export_onnx(module, call, onnx_path, rewrite=suit_openvino)
            try:
                model = _with_names_of_its_own(compress_weights(openvino.Core().read_model(onnx_path)))
                openvino.save_model(model, path, compress_to_fp16=False)
            except RuntimeError as error:
                check_room(path.parent, onnx_path.stat().st_size)
                raise ExportError(
                    f"Expected OpenVINO to read the exported model, but it says: {_reason(error)}. Exclude what it "
                    "does not know, or choose another runtime."
                ) from error

    def load(self, folder: Path, files: dict[str, str], signature: Signature, **options: Any) -> OpenVinoModule:
        """Load an artifact's model; options are `threads` and `device`."""
        return OpenVinoModule(folder / files["model"], signature, **options)

    def load_float(self, folder: Path, files: dict[str, str], signature: Signature, threads: int) -> OpenVinoModule:
        """Load a float model without the hints that artifacts get."""
        return OpenVinoModule(folder / files["model"], signature, threads=threads, by_default=True)

    def check(self, path: Path) -> None:
        """Compile a written model once.

        Raises:
            ExportError: OpenVINO refuses it.
        """
        try:
            compiled(path, threads=1)
        except RuntimeError as error:
            raise ExportError(f"Expected OpenVINO to run the exported model, but it says: {_reason(error)}") from error

    def standalone(self, files: dict[str, str], signature: Signature) -> str:
        """Return lines that run an artifact's model with OpenVINO alone, in the artifact's folder."""
        return _standalone(files, signature)

    def count_operators(self, path: Path) -> dict[str, int]:
        """Return how often each layer type occurs in the compiled model, integer ones with `_I8` after their names."""
        counts: collections.Counter[str] = collections.Counter()
        for node in compiled(path, threads=1).get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            layer, primitive = (info[key].astype(str) if key in info else "" for key in ("layerType", "primitiveType"))
            if layer not in ("Const", "Input", "Output"):
                counts[layer + (_INTEGER if primitive.endswith(_INTEGER) else "")] += 1
        return dict(counts)

    def quantized_edges(self, path: Path) -> set[str]:
        """Return the names of the plan's edges that a model has."""
        import openvino

        names = [op.get_friendly_name() for op in openvino.Core().read_model(path).get_ordered_ops()]
        return {name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)}

    def run_forced(self, path: Path, inputs: dict[str, Tensor], edges: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run every operator on its own, on given integers, in one compiled model."""
        try:
            return run_forced(path, inputs, edges, AS_SIMULATED | CPU_ONLY)
        except RuntimeError as error:
            raise ExportError(f"Expected OpenVINO to run each operator alone, but it says: {_reason(error)}") from error

    def operator_ms(
        self, path: Path, inputs: dict[str, Tensor], operators: tuple[Operator, ...], threads: int
    ) -> dict[str, float]:
        """Return what OpenVINO's counters say of each operator."""
        return operator_ms(path, inputs, operators, compiled(path, threads=threads, counts=True))


RUNTIME = OpenVino()


def _standalone(files: dict[str, str], signature: Signature) -> str:
    """Return lines that run an artifact's model with OpenVINO alone, in the artifact's folder."""
    names = [info.name for info in signature.outputs]
    return f"""import numpy as np
import openvino

model = openvino.Core().compile_model({files["model"]!r}, "CPU", {AS_SIMULATED | CPU_ONLY})
{numpy_inputs(signature)}
known = [inputs[port.get_node().get_friendly_name()] for port in model.inputs]
outputs = dict(zip({names!r}, model(known).values()))
"""


def _with_names_of_its_own(model: Any) -> Any:
    """Number the nodes, but inputs, that OpenVINO named anew: it counts all of a process, and equal models differed."""
    for index, op in enumerate(model.get_ordered_ops()):
        kind, _, number = op.get_friendly_name().rpartition("_")
        if kind == op.get_type_name() != "Parameter" and number.isdecimal():
            op.set_friendly_name(f"{kind}_{index}")
    return model


def _reason(error: BaseException) -> str:
    """Return the last line of what OpenVINO says; those before name places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _check_format(path: Path) -> None:
    """Make sure that a file is in OpenVINO's own format: it would try the readers of all others, by content."""
    with opened(path) as file:
        if not file.read(16).lstrip().startswith(b"<"):
            raise ArtifactError(f"Expected {path} to be a model for OpenVINO, but it is no XML.")


def _check_fits(model: Any, signature: Signature, path: Path) -> None:
    """Make sure that a compiled model's inputs and outputs are those of a signature."""
    expected = {info.name: _form(info) for info in signature.inputs}
    inputs = {port.get_node().get_friendly_name(): _port_form(port) for port in model.inputs}
    outputs = [_port_form(port)[0] for port in model.outputs]
    fits = all(expected.get(name) == form for name, form in inputs.items())
    if not fits or outputs != [_form(info)[0] for info in signature.outputs]:
        raise ArtifactError(
            f"Expected {path} to have the inputs and outputs of its signature, but {inputs} and {outputs} are not "
            f"{expected} and {list(signature.outputs)}."
        )


def _form(info: TensorInfo) -> tuple[str, list[int | None]]:
    return info.dtype, [size if isinstance(size, int) else None for size in info.shape]


def _port_form(port: Any) -> tuple[str, list[int | None]]:
    shape = port.get_partial_shape()
    return str(np.dtype(port.get_element_type().to_dtype())), [
        dimension.get_length() if dimension.is_static else None for dimension in shape
    ]
