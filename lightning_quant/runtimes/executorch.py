"""Runtime `executorch`: a .pte program for phones and small devices, whose integer operators XNNPACK carries out.

What the table says was tried on ExecuTorch 1.5 with torch 2.13, with the operators of the lowered graphs counted:
- XNNPACK knows int8 activations, not uint8: the same values with another zero point. It quantizes biases itself.
- A linear layer runs in integers only when its output is quantized, too.
- Average pools run in float; a padding is no part of a convolution, and has a grid of its own.
- Memory is planned for the largest sizes, so dimensions that vary have an upper bound.

Loading a program runs native code of the wheel on what the file says: load only what you trust.
"""

import collections
import functools
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.calls.call_checks import DTYPES
from lightning_quant.calls.calls import CapturedCall
from lightning_quant.calls.loaded import LoadedModule, beside
from lightning_quant.calls.signature import Signature
from lightning_quant.errors import ArtifactError, ExportError, QuantizationError
from lightning_quant.graph.moves import MOVING
from lightning_quant.graph.table import OperatorTable
from lightning_quant.runtimes._allowances import BilinearAsProducts
from lightning_quant.runtimes._flat import Flat, dynamic_shapes, example_tensors, exporting, quiet
from lightning_quant.runtimes._reasons import first_line
from lightning_quant.runtimes._runtime import Runtime
from lightning_quant.runtimes._standalone import torch_inputs
from lightning_quant.runtimes._xnnpack import INTEGER, as_xnnpack_reads_it, restore_bounds, xnnpack_nodes

# Largest batch of a program, unless the captured one is larger; other dimensions may grow by this factor.
_MAX_BATCH, _MAX_GROWTH = 64, 4
_FLOAT = "XNNPACK computes it in float"
_TABLE = OperatorTable(
    weighted=frozenset({"conv1d", "conv2d", "linear"}),
    fused_activations=frozenset({"relu", "relu6", "hardtanh", "clamp"}),
    float_output=frozenset(),
    own_scale=frozenset({"add", "mul"}),
    shared_scale=MOVING - {"pad"},
    reasons={
        **dict.fromkeys(("sub", "matmul", "avg_pool", "global_avg_pool", "attention", "tanh", "sigmoid"), _FLOAT),
        **dict.fromkeys(("leaky_relu", "hardswish", "hardsigmoid", "gelu", "silu", "mish", "elu", "prelu"), _FLOAT),
        **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv3d", "selu"), _FLOAT),
        **dict.fromkeys(("softplus", "layer_norm", "group_norm", "log_softmax"), _FLOAT),
        "cat": "XNNPACK wants one scale for all that it joins",
        "softmax": "kept float: eight bits are too few for its tails",
    },
    fuses_pad=False,
)
# What XNNPACK calls the operators of each kind; of integer ones.
_INTEGER_OPERATORS = {
    "conv1d": ("XNNConv2d" + INTEGER, "XNNDepthwiseConv2d" + INTEGER),
    "conv2d": ("XNNConv2d" + INTEGER, "XNNDepthwiseConv2d" + INTEGER),
    "linear": ("XNNFullyConnected" + INTEGER,),
    "add": ("XNNAdd" + INTEGER,),
    "mul": ("XNNMultiply" + INTEGER,),
}


class ExecuTorchModule(LoadedModule):
    """A .pte program that is called like the module it came from; tensors come back on the device of the inputs.

    Raises:
        ArtifactError: ExecuTorch refuses the program, or its inputs and outputs are not those of the signature.
    """

    shared = ("program", "method", "_lock")

    def __init__(self, path: Path, signature: Signature, *, threads: int | None = None) -> None:
        super().__init__(signature)
        _use_threads(threads)
        try:
            # The method points into the program.
            self.program = _program(path)
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(f"Expected {path} to be a program of ExecuTorch, but {first_line(error)}") from error
        self.method = self.program.load_method("forward")
        self.limits = _check_fits(self.method.metadata, signature, path)
        self._lock = threading.Lock()

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the program's method."""
        for info, tensor, limit in zip(self.signature.inputs, tensors, self.limits, strict=True):
            if any(size > most for size, most in zip(tensor.shape, limit, strict=True)):
                raise QuantizationError(
                    f"Expected `{info.name}` to be at most {limit} large, for which the program plans its memory, but "
                    f"got {tuple(tensor.shape)}. Call it with smaller batches, or export from a larger one."
                )
        inputs = [
            t.detach().to("cpu", DTYPES[info.dtype]).contiguous()
            for info, t in zip(self.signature.inputs, tensors, strict=True)
        ]
        # Results lie in the program's own memory, which the next call overwrites.
        with self._lock:
            outputs = [output.clone() for output in self.method.execute(inputs)]
        return beside(tensors, outputs)


class ExecuTorch(Runtime):
    """Programs of ExecuTorch, with XNNPACK."""

    NAME = "executorch"
    REQUIRES = ("executorch", "torchao")
    MODEL_FILE = "model.pte"
    UNROLLS = True
    TABLE = _TABLE
    INTEGER_OPERATORS = _INTEGER_OPERATORS

    def export(self, module: nn.Module, call: CapturedCall, path: Path) -> None:
        """Lower a module to XNNPACK and write the program.

        Raises:
            ExportError: torch.export or ExecuTorch refuses the module, with the reason.
        """
        examples = tuple(example_tensors(call))
        limits = {
            label: max(_MAX_BATCH, size) if label == "batch" else _MAX_GROWTH * size
            for name, tensor in zip(call.names, examples, strict=True)
            for dimension, label in call.dynamic.get(name, {}).items()
            for size in [tensor.shape[dimension]]
        }
        shapes = dynamic_shapes(call, limits)
        flat = Flat(module, call).eval()
        with exporting("ExecuTorch", call.names), BilinearAsProducts():
            # What XNNPACK leaves of the QDQ form has operators of its own, which this registers.
            import executorch.kernels.quantized  # noqa: F401
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            graph_module = as_xnnpack_reads_it(torch.export.export(flat, examples, dynamic_shapes=shapes).module())
            program = torch.export.export(
                graph_module, examples, dynamic_shapes=shapes[0] if shapes is not None else None
            )
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            restore_bounds(lowered.exported_program())
            path.write_bytes(lowered.to_executorch().buffer)
            _check_sizes_follow(path, flat, examples)

    def load(self, folder: Path, files: dict[str, str], signature: Signature, **options: Any) -> ExecuTorchModule:
        """Load an artifact's program; the option is `threads`, which holds for all programs of a process."""
        return ExecuTorchModule(folder / files["model"], signature, **options)

    def check(self, path: Path) -> None:
        """Load a written program once.

        Raises:
            ExportError: ExecuTorch refuses it.
        """
        try:
            _program(path)
        except RuntimeError as error:
            raise ExportError(f"Expected ExecuTorch to load the program, but it says: {first_line(error)}") from error

    def standalone(self, files: dict[str, str], signature: Signature) -> str:
        """Return lines that run an artifact's program with ExecuTorch alone, in the artifact's folder."""
        return _standalone(files, signature)

    def count_operators(self, path: Path) -> dict[str, int]:
        """Return how often each XNNPACK operator occurs in a program's delegates, and each other one beside them."""
        from executorch.exir._serialize._program import deserialize_pte_binary

        program = deserialize_pte_binary(path.read_bytes()).program
        counts: collections.Counter[str] = collections.Counter()
        for plan in program.execution_plan:
            counts.update(operator.name.removeprefix("aten::") for operator in plan.operators)
            for delegate in plan.delegates:
                counts.update(xnnpack_nodes(program.backend_delegate_data[delegate.processed.index].data))
        return dict(counts)


RUNTIME = ExecuTorch()


def _standalone(files: dict[str, str], signature: Signature) -> str:
    """Return lines that run an artifact's program with ExecuTorch alone, in the artifact's folder."""
    names = [info.name for info in signature.outputs]
    return f"""import torch
from executorch.runtime import Runtime

method = Runtime.get().load_program({files["model"]!r}).load_method("forward")
{torch_inputs(signature)}
outputs = dict(zip({names!r}, method.execute(list(inputs.values()))))
"""


# Programs that are alive: they point into the pool of threads.
_LOADED: "weakref.WeakSet[Any]" = weakref.WeakSet()


@functools.cache
def _runtime() -> Any:
    with quiet():
        from executorch.runtime import Runtime

        return Runtime.get()


def _program(path: Path) -> Any:
    """Load a program and its method; the file is read into memory, so that it may be replaced."""
    program = _runtime().load_program(path.read_bytes())
    program.load_method("forward")
    _LOADED.add(program)
    return program


def _use_threads(number: int | None) -> None:
    """Let the pool of the process, of which there is one, have so many threads.

    Raises:
        QuantizationError: a loaded program uses the pool, and would crash.
    """
    from executorch.extension.pybindings import portable_lib

    current = portable_lib._threadpool_get_thread_count()
    if number is None or current == number:
        return
    if _LOADED:
        # What nobody can reach any more, but in a circle, still counts.
        gc.collect()
    if _LOADED:
        raise QuantizationError(
            f"Expected `threads` to be {current}, as in the programs of ExecuTorch that are loaded, but got {number}: "
            "a process has one pool of threads. Let go of those programs first, or load this one in another process."
        )
    portable_lib._unsafe_reset_threadpool(number)


def _check_sizes_follow(path: Path, flat: Flat, examples: tuple[Tensor, ...]) -> None:
    """Make sure that results are as large as they should be for a batch of one, not as large as memory was planned.

    Raises:
        ExportError: they are not.
    """
    inputs = [
        tensor[:1].contiguous() if flat.call.dynamic.get(name, {}).get(0) == "batch" else tensor
        for name, tensor in zip(flat.call.names, examples, strict=True)
    ]
    expected = [tuple(tensor.shape) for tensor in flat(*inputs)]
    program = _program(path)
    actual = [tuple(tensor.shape) for tensor in program.load_method("forward").execute(inputs)]
    if actual != expected:
        raise ExportError(
            f"Expected ExecuTorch to give results of {expected} for a batch of one, but it gives {actual}: it does not "
            "resize a result that other operators read as well. Let the module return final results only, or choose "
            "another runtime."
        )


def _scalar_type(dtype: str) -> int:
    """Return the number that ExecuTorch's schema has for a dtype."""
    from executorch.exir.schema import ScalarType

    names = {"uint8": "BYTE", "int8": "CHAR", "int16": "SHORT", "int32": "INT", "int64": "LONG", "float16": "HALF"}
    names |= {"float32": "FLOAT", "float64": "DOUBLE", "bool": "BOOL", "bfloat16": "BFLOAT16"}
    return int(ScalarType[names[dtype]]) if dtype in names else -1


def _check_fits(metadata: Any, signature: Signature, path: Path) -> list[tuple[int, ...]]:
    """Make sure that a method's inputs and outputs are those of a signature; return the largest sizes of its inputs."""
    inputs = [metadata.input_tensor_meta(index) for index in range(metadata.num_inputs())]
    outputs = [metadata.output_tensor_meta(index) for index in range(metadata.num_outputs())]
    limits = [tuple(meta.sizes()) for meta in inputs]
    fits = (
        [meta.dtype() for meta in inputs] == [_scalar_type(info.dtype) for info in signature.inputs]
        and [meta.dtype() for meta in outputs] == [_scalar_type(info.dtype) for info in signature.outputs]
        and [len(limit) for limit in limits] == [len(info.shape) for info in signature.inputs]
        and all(
            isinstance(size, str) or size == most
            for info, limit in zip(signature.inputs, limits, strict=True)
            for size, most in zip(info.shape, limit, strict=True)
        )
    )
    if not fits:
        raise ArtifactError(
            f"Expected {path} to have the inputs and outputs of its signature, but it takes {limits} and gives "
            f"{[tuple(meta.sizes()) for meta in outputs]}."
        )
    return limits
