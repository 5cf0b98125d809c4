"""Runtime `onnxruntime`: QDQ models as ONNX files that ONNX Runtime fuses into its integer kernels.

What the table says was tried on ONNX Runtime 1.31, CPU, with counts from the optimized model:
- QLinearConv needs the output quantized; clips and ReLUs after it must be gone from the graph (the output's range
  clips), or conv and clip fuse in float first. LeakyReLU after a conv fuses in float too unless the conv's output is
  quantized.
- A zero pad between DequantizeLinear and Conv is merged into the conv's own padding.
- A mean over all places stays a float ReduceMean; an average pool over the whole window is QLinearAveragePool.
- QLinearConcat takes inputs of different scales, so they need not share one.
- Linear on more than two dimensions becomes MatMulIntegerToFloat and a float bias; flattened to two it is one QGemm.
- Activations of 16 bits have none at all: around Conv, Gemm, MatMul, Add, Mul, Concat, pooling and activations the
  session keeps DequantizeLinear and QuantizeLinear (uint16 or int16, opset 21) and computes in float.
- SiLU as a product with a Sigmoid runs in integers and is as near to float: three convolutions of 64 channels on 32x32
  with two of them took 0.57 ms for 0.79 with SiLU in float between two roundings (0.49 with ReLU). In float so take
  Hardswish 0.66, GELU 0.70, PReLU 1.14, Mish 1.89.
- Both products of attention run in integers where all that they read is rounded: 0.90 to 1.06 times the time of float,
  at 26 to 34 dB (`examples/benchmarks/attention.py`).
- There is no integer kernel for ConvTranspose, BatchNormalization, HardSwish, Gelu or PRelu on the CPU.
"""

import collections
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_quant.calls.call_checks import DTYPES
from lightning_quant.calls.calls import CapturedCall
from lightning_quant.calls.loaded import LoadedModule, beside, to_numpy
from lightning_quant.calls.signature import Signature
from lightning_quant.errors import ArtifactError, ExportError, QuantizationError
from lightning_quant.graph.moves import MOVING
from lightning_quant.graph.named_edges import PREFIX
from lightning_quant.graph.plan import Operator
from lightning_quant.graph.table import OperatorTable
from lightning_quant.machine.disk import check_room, scratch_folder
from lightning_quant.numerics.grid import FEWER_THAN_8, INTEGERS_8, INTEGERS_16
from lightning_quant.runtimes._onnx_export import describe, export_onnx
from lightning_quant.runtimes._onnx_forced import run_forced
from lightning_quant.runtimes._onnx_profile import operator_ms
from lightning_quant.runtimes._reasons import first_line
from lightning_quant.runtimes._runtime import Runtime
from lightning_quant.runtimes._standalone import numpy_inputs

_WITHOUT_KERNEL = (
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "sub", "layer_norm", "group_norm", "log_softmax"),
    *("hardswish", "hardsigmoid", "gelu", "mish", "prelu", "elu", "selu", "tanh", "softplus"),
)
_REASONS = {
    **dict.fromkeys(_WITHOUT_KERNEL, "ONNX Runtime has no integer kernel for it on the CPU"),
    "silu": "ONNX Runtime has no integer kernel for it on the CPU, but for the same as `x * torch.sigmoid(x)`",
    "softmax": "kept float: eight bits are too few for its tails",
    "attention": "in integers its products of two activations gain little time and cost accuracy",
}
_TABLE = OperatorTable(
    weighted=frozenset({"conv1d", "conv2d", "conv3d", "linear"}),
    fused_activations=frozenset({"relu", "relu6", "hardtanh", "clamp"}),
    float_output=frozenset({"linear", "matmul"}),
    quantized_unasked=frozenset({"softmax"}),
    own_scale=frozenset({"add", "mul", "matmul", "cat", "avg_pool", "global_avg_pool", "leaky_relu", "sigmoid"}),
    shared_scale=MOVING,
    reasons=_REASONS,
    grids=INTEGERS_8 | INTEGERS_16 | FEWER_THAN_8,
)
# Integer operators of an optimized session that carry out each kind.
_INTEGER_OPERATORS = {
    "conv1d": ("QLinearConv",),
    "conv2d": ("QLinearConv",),
    "conv3d": ("QLinearConv",),
    "linear": ("QGemm", "MatMulIntegerToFloat", "QLinearMatMul"),
    "matmul": ("QLinearMatMul", "MatMulIntegerToFloat"),
    "add": ("QLinearAdd",),
    "mul": ("QLinearMul",),
    "cat": ("QLinearConcat",),
    "avg_pool": ("QLinearAveragePool", "QLinearGlobalAveragePool"),
    "global_avg_pool": ("QLinearAveragePool", "QLinearGlobalAveragePool"),
    "leaky_relu": ("QLinearLeakyRelu",),
    "sigmoid": ("QLinearSigmoid",),
}

# What ONNX Runtime calls the types of a signature.
_TYPES = {
    **{name: f"tensor({name})" for name in ("float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool")},
    **{"float32": "tensor(float)", "float64": "tensor(double)"},
}


class OnnxRuntimeModule(LoadedModule):
    """An ONNX file that is called like the module it came from; tensors come back on the device of the inputs.

    Attributes:
        session: the `onnxruntime.InferenceSession`.

    Raises:
        ArtifactError: ONNX Runtime refuses the file, or its inputs and outputs are not those of the signature.
    """

    shared = ("session",)

    def __init__(
        self, path: Path, signature: Signature, *, threads: int | None = None, providers: list[str] | None = None
    ) -> None:
        super().__init__(signature)
        try:
            self.session = session(path, threads=threads, providers=providers)
        except _refusals() as error:
            raise ArtifactError(
                f"Expected {path} to be a model for ONNX Runtime, but it says: {first_line(error)}"
            ) from error
        _check_fits(self.session, signature, path)
        # An input that the result does not depend on is no input of the graph.
        known = {info.name for info in self.session.get_inputs()}
        self.unread = frozenset(info.name for info in signature.inputs) - known
        self._outputs = [info.name for info in signature.outputs]
        self._inputs = [
            (index, info.name, DTYPES[info.dtype]) for index, info in enumerate(signature.inputs) if info.name in known
        ]

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the session."""
        named = {name: to_numpy(tensors[index], dtype) for index, name, dtype in self._inputs}
        try:
            outputs = [torch.from_numpy(output) for output in self.session.run(self._outputs, named)]
        except _refusals() as error:
            raise QuantizationError(
                "Expected inputs that the model can take, such as sequences that it has positions for, but "
                f"{first_line(error)}"
            ) from error
        return beside(tensors, outputs)


class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU."""

    NAME = "onnxruntime"
    REQUIRES = ("onnxruntime", "onnx", "onnxscript")
    OPTIONS = ("threads", "providers")
    MODEL_FILE = "model.onnx"
    QUICK_FLOAT = True
    # The CPU has no kernels for half precision: it is for storage, and weights become float when a session starts.
    HALF_ARITHMETIC = False
    LAYERS_IN_GRAPHS = True
    TABLE = _TABLE
    INTEGER_OPERATORS = _INTEGER_OPERATORS
    KEEPS_EDGES = True

    def export(self, module: nn.Module, call: CapturedCall, path: Path) -> None:
        """Write a module as an ONNX file."""
        export_onnx(module, call, path)

    def describe(self, path: Path, facts: dict[str, Any]) -> None:
        """Write the notes that readers of ONNX files look for."""
        describe(path, facts)

    def load(self, folder: Path, files: dict[str, str], signature: Signature, **options: Any) -> OnnxRuntimeModule:
        """Load an artifact's model file; options are `threads` and `providers`.

        Raises:
            QuantizationError: a model to fill is given.
        """
        if "into" in options:
            raise QuantizationError(
                "Expected no `into`, but got one: an ONNX file has no tensors by name. Quantize for runtime 'torch'."
            )
        return OnnxRuntimeModule(folder / files["model"], signature, **options)

    def check(self, path: Path) -> None:
        """Start a session of a written file once.

        Raises:
            ExportError: ONNX Runtime refuses it.
        """
        try:
            session(path, threads=1)
        except _refusals() as error:
            raise ExportError(
                f"Expected ONNX Runtime to run the exported model, but it says: {first_line(error)}"
            ) from error

    def standalone(self, files: dict[str, str], signature: Signature) -> str:
        """Return lines that run an artifact's model with ONNX Runtime alone, in the artifact's folder."""
        return _standalone(files, signature)

    def count_operators(self, path: Path) -> dict[str, int]:
        """Return how often each operator type occurs in the session that ONNX Runtime makes of a file."""
        import onnx

        with scratch_folder() as folder:
            optimized = folder / "optimized.onnx"
            try:
                session(path, threads=1, optimized=optimized)
            except _refusals():
                # The file itself was loaded before: what is new is that it writes, with constants in float.
                check_room(folder, 4 * path.stat().st_size)
                raise
            graph = onnx.load(optimized, load_external_data=False).graph
        return dict(collections.Counter(node.op_type for node in graph.node))

    def quantized_edges(self, path: Path) -> set[str]:
        """Return the names of the plan's edges that a file has: what nothing reads is not in it."""
        import onnx

        graph = onnx.load(path, load_external_data=False).graph
        return {node.name.removeprefix(PREFIX) for node in graph.node if node.name.startswith(PREFIX)}

    def run_forced(self, path: Path, inputs: dict[str, Tensor], edges: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run every operator on its own, on given integers, in one session."""
        return run_forced(path, inputs, edges, session)

    def operator_ms(
        self, path: Path, inputs: dict[str, Tensor], operators: tuple[Operator, ...], threads: int
    ) -> dict[str, float]:
        """Return what ONNX Runtime's profiler says."""
        return operator_ms(path, inputs, operators, lambda f, profile: session(f, threads=threads, profile=profile))


RUNTIME = OnnxRuntime()


def _standalone(files: dict[str, str], signature: Signature) -> str:
    """Return lines that run an artifact's model with ONNX Runtime alone, in the artifact's folder."""
    names = [info.name for info in signature.outputs]
    return f"""import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession({files["model"]!r}, providers=["CPUExecutionProvider"])
{numpy_inputs(signature)}
known = {{info.name: inputs[info.name] for info in session.get_inputs()}}
outputs = dict(zip({names!r}, session.run({names!r}, known)))
"""


def session(
    path: Path,
    *,
    threads: int | None = None,
    providers: list[str] | None = None,
    optimized: Path | None = None,
    profile: Path | None = None,
) -> Any:
    """Start a session on `threads` threads (ONNX Runtime's default when None), on the CPU unless told otherwise.

    Args:
        path: an ONNX file.
        threads: of a call.
        providers: what executes it.
        optimized: gets what ONNX Runtime makes of the file.
        profile: what the name of its profile begins with.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=providers or ["CPUExecutionProvider"])


def _refusals() -> tuple[type[Exception], ...]:
    """Return the errors with which ONNX Runtime refuses a model; those of its own have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile")
    own = tuple(getattr(state, name) for name in (*names, "NotFound", "NotImplemented", "RuntimeException"))
    # What its bindings make of C++'s errors, of messages that are no text, and of sizes that do not fit the memory.
    return (*own, RuntimeError, UnicodeDecodeError, MemoryError)


def _check_fits(running: Any, signature: Signature, path: Path) -> None:
    """Make sure that a session's inputs and outputs are those of a signature."""
    expected = {info.name: _form(info.name, _TYPES.get(info.dtype, ""), info.shape) for info in signature.inputs}
    inputs = [_form(info.name, info.type, info.shape) for info in running.get_inputs()]
    wrong = [form for form in inputs if expected.get(form[0]) != form]
    outputs = [(info.name, _TYPES.get(info.dtype, "")) for info in signature.outputs]
    actual = [(info.name, info.type) for info in running.get_outputs()]
    if wrong or outputs != actual:
        raise ArtifactError(
            f"Expected {path} to have the inputs and outputs of its signature, but "
            + (f"input {wrong[0]} is none of {list(expected.values())}." if wrong else f"{actual} are not {outputs}.")
        )


def _form(name: str, kind: str, shape: Any) -> tuple[str, str, list[int | None]]:
    return name, kind, [size if isinstance(size, int) else None for size in shape]
