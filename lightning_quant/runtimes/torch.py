"""Runtime `torch`: PyTorch in process, with quantized layers or with its native quantized kernels.

Recipes of layers run by `torch.ops.lightning_quant` (see `_torch_layers.py`); static int8 runs on tensors that PyTorch
itself quantizes, by the kernels of an engine out of fbgemm, x86, onednn and qnnpack. Either way an artifact is a
safetensors file and a program in JSON: nothing is unpickled.

What the table says was tried on torch 2.13, x86, with the integers of each kernel compared with exact ones:
- All engines take int8 weights per channel and uint8 activations, and requantize them alike to within a step.
- Full-range weights saturate in depthwise convolutions of fbgemm on some machines: which engine is right is a
  measurement, made where the artifact is written.
- Average pools keep their input's scale, which is too coarse for means; sigmoid has one fixed scale in qnnpack.
- These kernels belong to an interface that PyTorch calls deprecated without naming another for engines other than
  oneDNN.
"""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_quant.calls.calls import CapturedCall
from lightning_quant.calls.signature import Signature
from lightning_quant.errors import QuantizationError
from lightning_quant.graph.moves import MOVING
from lightning_quant.graph.qdq import is_static
from lightning_quant.graph.table import OperatorTable
from lightning_quant.runtimes import _torch_layers, _torch_static, _torch_steps
from lightning_quant.runtimes._fill import fill
from lightning_quant.runtimes._runtime import Runtime

_FLOAT = "PyTorch has no integer kernel for it that every engine runs"
_COARSE = "PyTorch's integer kernel keeps the scale of its input, which is too coarse for means"
_TABLE = OperatorTable(
    weighted=frozenset({"conv1d", "conv2d", "linear"}),
    fused_activations=frozenset({"relu", "relu6", "hardtanh", "clamp"}),
    float_output=frozenset(),
    own_scale=frozenset({"add", "mul", "cat", "leaky_relu"}),
    shared_scale=MOVING,
    reasons={
        **dict.fromkeys(("avg_pool", "global_avg_pool"), _COARSE),
        **dict.fromkeys(("sub", "matmul", "attention", "tanh", "sigmoid", "layer_norm", "group_norm"), _FLOAT),
        **dict.fromkeys(("hardswish", "hardsigmoid", "gelu", "silu", "mish", "elu", "prelu", "selu"), _FLOAT),
        **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv3d"), _FLOAT),
        **dict.fromkeys(("softplus", "log_softmax"), _FLOAT),
        "softmax": "kept float: eight bits are too few for its tails",
    },
)
# Kernels that carry out each kind.
_INTEGER_OPERATORS = {
    "conv1d": ("quantized.conv1d.default",),
    "conv2d": ("quantized.conv2d.new",),
    "linear": ("quantized.linear.default",),
    "add": ("quantized.add.default",),
    "mul": ("quantized.mul.default",),
    "cat": ("quantized.cat.default",),
    "leaky_relu": ("quantized.leaky_relu.default",),
}


class Torch(Runtime):
    """PyTorch in process."""

    NAME = "torch"
    REQUIRES = ("torch",)
    OPTIONS = ("threads", "engine", "into")
    MODEL_FILE = "model.safetensors"
    HALF_ARITHMETIC = True
    IN_PROCESS = True
    LAYERS_IN_GRAPHS = True
    FILLS_MODULES = True
    TABLE = _TABLE
    INTEGER_OPERATORS = _INTEGER_OPERATORS
    KEEPS_EDGES = True

    def engines(self) -> list[str]:
        """Return the engines that this build of PyTorch has kernels of, the likeliest one first."""
        return _torch_static.engines()

    def set_engine(self, path: Path, engine: str) -> None:
        """Let a written program run on an engine unless `load` is given another."""
        _torch_static.set_engine(path, engine)

    def quantized_edges(self, path: Path) -> set[str]:
        """Return the names of the plan's edges that a program has: none where it stores layers alone."""
        return _torch_static.quantized_edges(path) if _is_static(path) else set()

    def export_tensors(self, module: nn.Module, path: Path) -> None:
        """Write the quantized layers and tensors of a module alone, for a module of the user's to be filled with."""
        _torch_layers.export_tensors(module, path)

    def run_forced(self, path: Path, inputs: dict[str, Tensor], edges: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run every operator on its own, on given integers, kernel by kernel."""
        return _torch_static.run_forced(path, inputs, edges)

    def export(self, module: nn.Module, call: CapturedCall, path: Path) -> None:
        """Write a module as tensors and a program beside them.

        Raises:
            ExportError: PyTorch's exporter refuses the module, with its reason, or a part of it is none of PyTorch's.
        """
        write = _torch_static.export if is_static(module) else _torch_layers.export
        write(module, call, path)

    def load(
        self,
        folder: Path,
        files: dict[str, str],
        signature: Signature,
        *,
        into: nn.Module | None = None,
        **options: Any,
    ) -> Any:
        """Load an artifact, or fill a model with one of layers.

        Args:
            folder: the artifact's folder.
            files: role to name.
            signature: of the captured call.
            into: a float model of the structure of the one that was quantized. Its layers are replaced and its tensors
                set; it keeps its class and methods, such as `generate`.
            **options: `threads`; `engine` for static recipes, the one that was chosen by default.

        Raises:
            QuantizationError: there are no layers to fill a model with.
        """
        if _torch_steps.FILE not in files:
            if into is not None:
                return fill(into, folder / files["model"])
            return _torch_layers.TorchLayersModule(folder, files, signature, **options)
        if into is not None:
            raise QuantizationError(
                "Expected no `into`, but got one: a static recipe quantizes what runs between layers, too. Use a "
                "recipe of layers, such as 'int8_dynamic'."
            )
        return _torch_static.TorchStaticModule(folder, files, signature, **options)

    def check(self, path: Path) -> None:
        """Load a written program once.

        Raises:
            ExportError: it cannot be read.
        """
        (_torch_static if _is_static(path) else _torch_layers).check(path)

    def standalone(self, files: dict[str, str], signature: Signature) -> str:
        """Return lines that run an artifact in its folder, with PyTorch and safetensors alone where it is static."""
        return (_torch_static if _torch_steps.FILE in files else _torch_layers).standalone(files, signature)

    def count_operators(self, path: Path) -> dict[str, int]:
        """Return how often each operator occurs in a written program."""
        return (_torch_static if _is_static(path) else _torch_layers).count_operators(path)


RUNTIME = Torch()


def _is_static(path: Path) -> bool:
    return (path.parent / _torch_steps.FILE).exists()
