"""Quantized layers in process: a program that calls `torch.ops.lightning_quant`, and the tensors beside it.

The model is two files without pickled objects: model.safetensors holds every tensor once, program.json.gz the captured
call as steps (see `_torch_steps.py`), without tensors. So weights that are tied stay tied, and the same file can fill a
model that the user built.

The program is not the one that PyTorch's exporter saves: its reader gives texts of the file to SymPy, which evaluates
them as Python, and takes any attribute of torch for an operator.

What was tried and is not used: torchao's Int8DynamicActivationInt8WeightConfig is slower than float in eager mode and
needs a C++ compiler otherwise; torch.ao's dynamic layers have one activation scale for the tensor (see
`layers/kernels.py` and `layers/recurrent.py` for figures).
"""

import collections
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_quant.calls.call_checks import DTYPES
from lightning_quant.calls.calls import CapturedCall
from lightning_quant.calls.loaded import LoadedModule, beside
from lightning_quant.calls.signature import Signature
from lightning_quant.errors import ArtifactError, ExportError
from lightning_quant.layers import StoredLayer
from lightning_quant.layers.packed import recurrences_whole
from lightning_quant.runtimes import _torch_steps as steps
from lightning_quant.runtimes._fill import CONSTANT, STRUCTURE
from lightning_quant.runtimes._flat import Flat, check_forms, example_tensors, exporting, forms_of_call, tensors_in
from lightning_quant.runtimes._torch_program import Program
from lightning_quant.surgery.process import torch_threads

_PROGRAM = "program.json.gz"


class TorchLayersModule(LoadedModule):
    """An exported program with its tensors.

    Raises:
        ArtifactError: the files are something else, or the program has other inputs and outputs than the signature.
    """

    shared = ("program",)

    def __init__(
        self, folder: Path, files: dict[str, str], signature: Signature, *, threads: int | None = None
    ) -> None:
        super().__init__(signature)
        if _PROGRAM not in files:
            raise ArtifactError(f"Expected the artifact to have a {_PROGRAM}, but it has {sorted(files)}.")
        path = folder / files[_PROGRAM]
        program = steps.read_steps(path)
        check_forms(program, signature, path)
        self.threads = threads
        self.program = _ready(program, folder / files["model"], path)
        # Of a program whose steps have been read.
        self.unread = steps.unread_inputs(program)

    @torch.no_grad()
    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the program."""
        dtypes = [DTYPES[info.dtype] for info in self.signature.inputs]
        values = [tensor.detach().to("cpu", dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
        with torch_threads(self.threads):
            outputs = self.program(values)
        return beside(tensors, outputs)


class _Functional(nn.Module):
    """Calls a module with tensors that come as an argument, so that its program has none of its own."""

    def __init__(self, flat: Flat) -> None:
        super().__init__()
        self.__dict__["flat"] = flat

    def forward(self, state: dict[str, Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        named = {f"module.{name}": tensor for name, tensor in state.items()}
        return functional_call(self.__dict__["flat"], named, tuple(tensors))


def export(module: nn.Module, call: CapturedCall, path: Path) -> None:
    """Write a module as tensors and a program.

    Args:
        module: with stored layers, or float, in eval mode.
        call: what to export it for.
        path: file of tensors to write; the program goes beside it.

    Raises:
        ExportError: PyTorch's exporter refuses the module, with its reason.
    """
    state = state_of(module)
    # Which dimensions are equal, and how long they may get, is found by the exporter.
    open_dimension = torch.export.Dim.DYNAMIC
    shapes = [dict.fromkeys(call.dynamic.get(name, {}), open_dimension) for name in call.names]
    examples = example_tensors(call)
    with exporting("PyTorch's exporter", call.names), recurrences_whole():
        program = torch.export.export(
            _Functional(Flat(module, call).eval()),
            (state, examples),
            dynamic_shapes=(dict.fromkeys(state), shapes),
            strict=False,
        )
        functional = program.run_decompositions({}).module(check_guards=False)
    steps.simplify(functional.graph)
    inputs, outputs = forms_of_call(Flat(module, call), tuple(examples))
    placeholders = [steps.TENSOR + name for name in state] + [info["name"] for info in inputs]
    described = {"inputs": inputs, "outputs": outputs}
    steps.write_steps(functional, path.parent / _PROGRAM, described, placeholders, CONSTANT)
    _save(module, {**state, **steps.tensors_of(functional, CONSTANT)}, path)


def export_tensors(module: nn.Module, path: Path) -> None:
    """Write the tensors of a module alone, for a module of the user's to be filled with."""
    (path.parent / _PROGRAM).unlink(missing_ok=True)
    _save(module, state_of(module), path)


def _save(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    layers = {name: child.scheme.name for name, child in module.named_modules() if isinstance(child, StoredLayer)}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry, since the file has entries in no fixed order.
    try:
        save_file(contiguous, path, metadata={STRUCTURE: json.dumps({"layers": layers, "aliases": _aliases(module)})})
    except RuntimeError as error:  # Tensors of which one is in the other's memory.
        raise ExportError(f"Expected tensors that can be stored, but {' '.join(str(error).split())[:200]}.") from error


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of a module once, by name, those that `state_dict` leaves out among them."""
    return dict(sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()))


def check(path: Path) -> None:
    """Load a written program once.

    Raises:
        ExportError: it cannot be read.
    """
    file = path.parent / _PROGRAM
    try:
        _ready(steps.read_steps(file), path, file)
    except ArtifactError as error:
        raise ExportError(str(error)) from error


def standalone(files: dict[str, str], signature: Signature) -> str:
    """Return lines that run an artifact in its folder; its operators are this package's."""
    if _PROGRAM not in files:
        return f"""# It has no program: the float module, built by its own code, takes its layers and tensors.
import lightning_quant

module = lightning_quant.load(".", into=module)
# The weights alone, by name: safetensors.torch.load_file({files["model"]!r})
"""
    arguments = ", ".join(f"{name}=..." for name, _, default in signature.parameters if default == "required")
    return f"""# The operators of this runtime are lightning_quant's own, so the package must be installed.
import lightning_quant

model = lightning_quant.load(".")
output = model({arguments})
# The weights alone, by name: safetensors.torch.load_file({files["model"]!r})
"""


def count_operators(path: Path) -> dict[str, int]:
    """Return how often each operator occurs in a written program."""
    program = path.parent / _PROGRAM
    return dict(
        collections.Counter(step["call"] for step in steps.read_steps(program)["steps"]) if program.exists() else ()
    )


def _ready(program: dict[str, Any], model: Path, path: Path) -> Program:
    """Return a program with the tensors of a file; what is stored stays so until a step widens it, in each call."""
    import lightning_quant.layers  # noqa: F401

    tensors = {steps.TENSOR + name: tensor for name, tensor in tensors_in(model).items()}
    return Program(program, tensors, path, once=False)


def _aliases(module: nn.Module) -> dict[str, str]:
    """Return every further name of a tensor to the first."""
    first: dict[int, str] = {}
    aliases = {}
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return aliases
