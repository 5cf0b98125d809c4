"""Static int8 on PyTorch's native kernels: a safetensors file, and a program of steps beside it."""

import collections
import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_quant.calls.call_checks import DTYPES
from lightning_quant.calls.calls import CapturedCall
from lightning_quant.calls.loaded import LoadedModule, beside
from lightning_quant.calls.signature import Signature
from lightning_quant.errors import ArtifactError, ExportError, QuantizationError
from lightning_quant.graph.named_edges import EdgeNames, check_common
from lightning_quant.layers.packed import recurrences_whole
from lightning_quant.runtimes import _torch_steps as steps
from lightning_quant.runtimes._flat import (
    Flat,
    check_forms,
    dynamic_shapes,
    example_tensors,
    exporting,
    forms_of_call,
    tensors_in,
)
from lightning_quant.runtimes._standalone import torch_inputs
from lightning_quant.runtimes._torch_program import Forced, Program
from lightning_quant.surgery.process import quantized_engine, resizable_results, torch_threads


class TorchStaticModule(LoadedModule):
    """A program of native quantized kernels that is called like the module it came from.

    Attributes:
        engine: whose kernels run.

    Raises:
        ArtifactError: this PyTorch refuses the program, or it has other inputs and outputs than the signature.
    """

    shared = ("program",)

    def __init__(
        self,
        folder: Path,
        files: dict[str, str],
        signature: Signature,
        *,
        threads: int | None = None,
        engine: str | None = None,
    ) -> None:
        super().__init__(signature)
        path = folder / files[steps.FILE]
        program = steps.read_steps(path)
        check_forms(program, signature, path)
        self.engine = program["engine"] if engine is None else engine
        _check_engine(self.engine)
        self.threads = threads
        with _native(self.engine):
            self.program = Program(program, tensors_in(folder / files["model"]), path, once=True)
        # Of a program whose steps have been read.
        self.unread, self.resizes = steps.unread_inputs(program), _resizes(program, self.engine)

    @torch.no_grad()
    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the program."""
        dtypes = [DTYPES[info.dtype] for info in self.signature.inputs]
        values = [tensor.detach().to("cpu", dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
        with torch_threads(self.threads), _running(resizes=self.resizes):
            outputs = self.program(values)
        return beside(tensors, [output.contiguous() for output in outputs])


def export(module: nn.Module, call: CapturedCall, path: Path) -> None:
    """Write a QDQ module as tensors and steps.

    Raises:
        ExportError: PyTorch's exporter refuses the module, with its reason, or a part of it is no operator of PyTorch.
    """
    from safetensors.torch import save_file

    from lightning_quant.runtimes._torch_lowering import lower

    examples = tuple(example_tensors(call))
    flat = Flat(module, call).eval()
    with exporting("PyTorch's exporter", call.names), recurrences_whole():
        program = torch.export.export(flat, examples, dynamic_shapes=dynamic_shapes(call))
        lowered = lower(program.run_decompositions({}).module(check_guards=False), EdgeNames(flat))
    inputs, outputs = forms_of_call(flat, examples)
    about = {"engine": engines()[0], "inputs": inputs, "outputs": outputs}
    steps.write_steps(lowered, path.parent / steps.FILE, about, [info["name"] for info in inputs])
    held = {steps.TENSOR + name: tensor for name, tensor in steps.tensors_of(lowered).items()}
    save_file({name: t.detach().cpu().clone().contiguous() for name, t in held.items()}, path)


def engines() -> list[str]:
    """Return the engines that this build of PyTorch has kernels of, the likeliest one first."""
    preferred = ("onednn", "x86", "fbgemm", "qnnpack")
    return [name for name in preferred if name in torch.backends.quantized.supported_engines]


def set_engine(path: Path, engine: str) -> None:
    """Let a written program run on an engine unless `load` is given another."""
    _check_engine(engine)
    program = path.parent / steps.FILE
    steps.write({**steps.read_steps(program), "engine": engine}, program)


def check(path: Path) -> None:
    """Load a written program once.

    Raises:
        ExportError: it cannot be read.
    """
    try:
        _built(path)
    except ArtifactError as error:
        raise ExportError(str(error)) from error


def standalone(files: dict[str, str], signature: Signature) -> str:
    """Return lines that run an artifact with PyTorch and safetensors alone, but for stored layers and recurrences."""
    names = [info.name for info in signature.outputs]
    return f"""import gzip
import json
import math
import operator

import torch
from safetensors.torch import load_file

program = json.loads(gzip.open({files[steps.FILE]!r}).read())
if any(step["call"].startswith("lightning_quant.") for step in program["steps"]):
    # Operators of stored layers, and of recurrences.
    import lightning_quant.layers
roots = {{"operator": operator, "math": math, "torch": torch}}
torch.backends.quantized.engine = program["engine"]
{torch_inputs(signature)}
values = {{**load_file({files["model"]!r}), **inputs}}


def read(value):
    if isinstance(value, dict):
        ((kind, name),) = value.items()
        return values[name] if kind == "value" else getattr(torch, name) if kind == "torch" else float(name)
    return [read(item) for item in value] if isinstance(value, list) else value


for step in program["steps"]:
    root, _, name = step["call"].partition(".")
    function = operator.attrgetter(name)(roots.get(root) or getattr(torch.ops, root))
    kwargs = {{key: read(value) for key, value in step["kwargs"].items()}}
    values[step["name"]] = function(*read(step["args"]), **kwargs)
outputs = dict(zip({names!r}, read(program["results"])))
"""


def count_operators(path: Path) -> dict[str, int]:
    """Return how often each operator occurs in a written program, those that pack weights left out."""
    calls = (step["call"] for step in steps.read_steps(path.parent / steps.FILE)["steps"])
    return dict(collections.Counter(call for call in calls if "prepack" not in call and "_make_per" not in call))


def quantized_edges(path: Path) -> set[str]:
    """Return the names of the plan's edges that a program has."""
    return {step["edge"] for step in steps.read_steps(path.parent / steps.FILE)["steps"] if "edge" in step}


def run_forced(path: Path, inputs: dict[str, Tensor], edges: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run every operator on its own, on given integers; as in `onnxruntime.py`.

    Raises:
        ExportError: the program has none of these quantized tensors.
    """
    program, module = _built(path)
    check_common(edges, quantized_edges(path))
    given = {name: torch.from_numpy(integers) for name, integers in edges.items()}
    forced = Forced(module, given, program["engine"])
    with _running(resizes=_resizes(program, program["engine"])), torch.no_grad():
        forced.run([inputs[info["name"]].detach().cpu() for info in program["inputs"]])
    return {name: integers.numpy() for name, integers in forced.computed.items()}


def _built(path: Path) -> tuple[dict[str, Any], Program]:
    """Return the program beside a file of tensors, as it is written and ready to run."""
    file = path.parent / steps.FILE
    program = steps.read_steps(file)
    _check_engine(program["engine"])
    with _native(program["engine"]):
        return program, Program(program, tensors_in(path), file, once=True)


def _check_engine(engine: str) -> None:
    if engine not in engines():
        raise QuantizationError(f"Expected `engine` to be one of {engines()} of this PyTorch, but got {engine!r}.")


def _resizes(program: dict[str, Any], engine: str) -> bool:
    """Tell whether kernels resize their results: linear layers of some engines, and padding that reflects."""
    return engine in ("x86", "fbgemm") or any("reflect" in step["args"] for step in program["steps"])


def _running(*, resizes: bool) -> contextlib.AbstractContextManager[None]:
    """Return what kernels need set while they run: nothing, but for those that resize their results."""
    return resizable_results() if resizes else contextlib.nullcontext()


@contextlib.contextmanager
def _native(engine: str) -> Iterator[None]:
    """Use an engine, and let PyTorch have said, once and unheard, that it means to retire these tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
    with quantized_engine(engine):
        yield
