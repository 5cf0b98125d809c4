"""Runtime `inductor`: the QDQ graph compiled ahead of time into a .pt2 package of native code for this kind of CPU.

What the table says was tried on torch 2.13 with the patterns of torchao 0.18, x86, with kernels counted in the
generated code:
- A convolution adds a quantized tensor in its own kernel before it rounds; a quantizer between them costs a kernel.
- Max-pool and reshape pass integers on; averages, sums of other things and activations run in float in generated code.
- Without `freezing`, `no_grad` and torchao's patterns there are no integer kernels and no error.

Loading a package runs its native code: load only what you trust.
"""

import collections
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.calls.call_checks import DTYPES
from lightning_quant.calls.calls import CapturedCall
from lightning_quant.calls.loaded import LoadedModule, beside
from lightning_quant.calls.signature import Signature
from lightning_quant.errors import ArtifactError, ExportError, MissingRuntimeError
from lightning_quant.graph.moves import MOVING
from lightning_quant.graph.plan import Operator
from lightning_quant.graph.table import OperatorTable
from lightning_quant.machine.machine import cpu_flags, cpu_name
from lightning_quant.runtimes._flat import (
    Flat,
    Forms,
    dynamic_shapes,
    example_tensors,
    exporting,
    forms_of_call,
    forms_of_signature,
    quiet,
)
from lightning_quant.runtimes._reasons import first_line
from lightning_quant.runtimes._runtime import Runtime
from lightning_quant.runtimes._spelled_out import BinsSpelledOut
from lightning_quant.runtimes._standalone import torch_inputs
from lightning_quant.surgery.process import torch_threads

_FLOAT = "Inductor computes it in float"
_TABLE = OperatorTable(
    weighted=frozenset({"conv2d", "linear"}),
    fused_activations=frozenset({"relu", "relu6", "hardtanh", "clamp"}),
    float_output=frozenset({"linear"}),
    own_scale=frozenset({"add"}),
    shared_scale=MOVING,
    reasons={
        **dict.fromkeys(("mul", "sub", "matmul", "cat", "avg_pool", "global_avg_pool", "attention", "tanh"), _FLOAT),
        **dict.fromkeys(("leaky_relu", "sigmoid", "hardswish", "hardsigmoid", "gelu", "silu", "mish", "elu"), _FLOAT),
        **dict.fromkeys(("conv1d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv3d"), _FLOAT),
        **dict.fromkeys(("prelu", "selu", "softplus", "layer_norm", "group_norm", "log_softmax"), _FLOAT),
        "softmax": "kept float: eight bits are too few for its tails",
    },
    fuses_add=True,
    fuses_pad=False,
    # Whether such an input lies in channels_last order cannot be told: Inductor takes the result to be contiguous, the
    # kernel writes channels_last.
    one_channel="Inductor reads the integer convolution of a single channel in the wrong order",
)
# How the integer kernels' names begin.
_KERNELS: dict[str, tuple[str, ...]] = {"conv2d": ("qconv",), "linear": ("qlinear",), "add": ()}
# Keys of what a package says of itself.
_INPUTS, _OUTPUTS = "lightning_quant_inputs", "lightning_quant_outputs"
# What Inductor and the system call instruction sets.
_FLAGS = {"AVX2": "avx2", "AVX512": "avx512f", "AVX512_VNNI": "avx512_vnni", "AMX_TILE": "amx_tile"}
_OPTIONS = {"freezing": True, "cpp.dynamic_threads": True}


class InductorModule(LoadedModule):
    """A .pt2 package that is called like the module it came from.

    Raises:
        ArtifactError: torch refuses the package, or it has other inputs and outputs than the signature.
    """

    shared = ("package",)

    def __init__(self, path: Path, signature: Signature, *, threads: int | None = None) -> None:
        super().__init__(signature)
        self.threads = threads
        _check_processor(path)
        try:
            self.package = torch._inductor.aoti_load_package(str(path))
        except (RuntimeError, OSError) as error:
            raise ArtifactError(
                f"Expected {path} to be a package of Inductor, but torch says: {first_line(error)}"
            ) from error
        _check_fits(self.package, signature, path)

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the package."""
        dtypes = [DTYPES[info.dtype] for info in self.signature.inputs]
        # Generated code reads memory by the strides of the example.
        inputs = [t.detach().to("cpu", dtype).contiguous() for t, dtype in zip(tensors, dtypes, strict=True)]
        with torch.no_grad(), torch_threads(self.threads):
            outputs = self.package(*inputs)
        return beside(tensors, outputs)


class Inductor(Runtime):
    """Packages of native code by Inductor."""

    NAME = "inductor"
    REQUIRES = ("torchao",)
    MODEL_FILE = "model.pt2"
    COMPILES = True
    UNROLLS = True
    TABLE = _TABLE
    INTEGER_OPERATORS = _KERNELS

    def export(self, module: nn.Module, call: CapturedCall, path: Path) -> None:
        """Compile a module into a package.

        Raises:
            ExportError: torch.export or Inductor refuses the module, with the reason.
            MissingRuntimeError: there is no C++ compiler.
        """
        self.check_machine()
        # Registers the patterns that make integer kernels of quantize and dequantize.
        with quiet():
            import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
        examples = tuple(t.contiguous() for t in example_tensors(call))
        flat = Flat(module, call).eval()
        options = {**_OPTIONS, "aot_inductor.metadata": _as_metadata(forms_of_call(flat, examples))}
        with exporting("Inductor", call.names), BinsSpelledOut():
            program = torch.export.export(flat, examples, dynamic_shapes=dynamic_shapes(call))
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
        _make_reproducible(path)

    def load(self, folder: Path, files: dict[str, str], signature: Signature, **options: Any) -> InductorModule:
        """Load an artifact's package; the option is `threads`."""
        return InductorModule(folder / files["model"], signature, **options)

    def check(self, path: Path) -> None:
        """Load a written package once.

        Raises:
            ExportError: torch refuses it.
        """
        try:
            torch._inductor.aoti_load_package(str(path))
        except RuntimeError as error:
            raise ExportError(
                f"Expected torch to load the compiled package, but it says: {first_line(error)}"
            ) from error

    def check_machine(self) -> None:
        """Make sure that there is a C++ compiler, which exporting needs and loading does not.

        Raises:
            MissingRuntimeError: there is none.
        """
        from torch._inductor import config, exc
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except (exc.InvalidCxxCompiler, OSError) as error:
            raise MissingRuntimeError(
                f"Expected a C++ compiler for `runtime` 'inductor', but none of {config.cpp.cxx} was found. Install "
                "one (Debian: apt install g++) or name it in the environment variable CXX."
            ) from error

    def standalone(self, files: dict[str, str], signature: Signature) -> str:
        """Return lines that run an artifact's package with torch alone, in the artifact's folder."""
        return _standalone(files, signature)

    def count_operators(self, path: Path) -> dict[str, int]:
        """Return how often the generated code calls each integer kernel, and each float one that multiplies."""
        with zipfile.ZipFile(path) as archive:
            sources = [name for name in archive.namelist() if name.endswith(".wrapper.cpp")]
            code = "".join(archive.read(name).decode() for name in sources)
        calls = re.findall(r"aoti_torch_cpu__?(\w*(?:qconv|qlinear|convolution|conv|linear|addmm|mm)\w*)\(", code)
        return dict(collections.Counter(calls))

    def still_float(self, operators: tuple[Operator, ...], counts: dict[str, int]) -> dict[str, int]:
        """Return kind to number of planned convolutions and linear layers for which there is no integer kernel."""
        missing = {}
        for kind, names in self.INTEGER_OPERATORS.items():
            planned = sum(operator.kind == kind for operator in operators if names)
            there = sum(number for name, number in counts.items() if name.startswith(names))
            if planned > there:
                missing[kind] = planned - there
        return missing


RUNTIME = Inductor()


def _standalone(files: dict[str, str], signature: Signature) -> str:
    """Return lines that run an artifact's package with torch alone, in the artifact's folder."""
    names = [info.name for info in signature.outputs]
    return f"""import torch
import torch._inductor

package = torch._inductor.aoti_load_package({files["model"]!r})
{torch_inputs(signature)}
outputs = dict(zip({names!r}, package(*inputs.values())))
"""


def _make_reproducible(path: Path) -> None:
    """Leave out of a package what would make two exports of one model differ.

    Inductor appends the compiler's command line to the sources in its cache at every export, with paths of this
    machine, and a package has a random number.
    """
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            kept = content.partition(b"// Compile cmd")[0] if name.endswith(".cpp") else content
            archive.writestr(zipfile.ZipInfo(name), b"0" * len(kept) if name.endswith("/serialization_id") else kept)


def _as_metadata(forms: Forms) -> dict[str, str]:
    """Return what a package says of its inputs and outputs: native code does not check what it is given."""
    return {key: json.dumps(form) for key, form in zip((_INPUTS, _OUTPUTS), forms, strict=True)}


def _check_fits(package: Any, signature: Signature, path: Path) -> None:
    """Make sure that a package's inputs and outputs are those of a signature."""
    written = package.get_metadata()
    expected = _as_metadata(forms_of_signature(signature))
    actual = {key: written.get(key) for key in expected}
    if actual != expected:
        raise ArtifactError(
            f"Expected {path} to have the inputs and outputs of its signature, but {actual} is not {expected}."
        )


def _check_processor(path: Path) -> None:
    """Make sure that this processor has the instructions that a package was compiled for.

    Raises:
        ArtifactError: it has not, or the file is no package.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            described = [n for n in archive.namelist() if n.endswith("wrapper_metadata.json")]
            needed = {isa for n in described for isa in json.loads(archive.read(n)).get("AOTI_CPU_ISA", "").split()}
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ArtifactError(f"Expected {path} to be a package of Inductor, but it is none: {error}.") from error
    flags = cpu_flags()
    missing = sorted(isa for isa in needed if flags and _FLAGS.get(isa, "") not in {"", *flags})
    if missing:
        raise ArtifactError(
            f"Expected a processor with {', '.join(missing)}, for which {path} was compiled, but this is {cpu_name()}. "
            "Export on a machine like the one that runs it, or choose another runtime."
        )
