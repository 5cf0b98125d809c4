"""Quantized layers in process: a program that calls `torch.ops.lightning_quant`, and the tensors beside it.

The model is two files without pickled objects: model.safetensors holds every tensor once, program.json.gz the captured
call as PyTorch's exporter writes it, without tensors. So weights that are tied stay tied, and the same file can fill a
model that the user built.

What was tried and is not used: torchao's Int8DynamicActivationInt8WeightConfig is slower than float in eager mode and
needs a C++ compiler otherwise; torch.ao's dynamic layers have one activation scale for the tensor (see
`layers/kernels.py` and `layers/recurrent.py` for figures).
"""

import collections
import gzip
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_quant.calls import CallSpec
from lightning_quant.errors import ArtifactError, ExportError, QuantizationError
from lightning_quant.latency import torch_threads
from lightning_quant.layers import StoredLayer
from lightning_quant.loaded import LoadedModule
from lightning_quant.runtimes._fill import CONSTANT, STRUCTURE
from lightning_quant.runtimes._flat import Flat, example_tensors, exporting, first_line
from lightning_quant.signature import Signature

_PROGRAM = "program.json.gz"
# What PyTorch's reader raises, beside its own error, when a program is not what it expects.
_DAMAGE = (AttributeError, RuntimeError, AssertionError)


class TorchLayersModule(LoadedModule):
    """An exported program with its tensors."""

    def __init__(
        self, folder: Path, files: dict[str, str], signature: Signature, *, threads: int | None = None
    ) -> None:
        from safetensors.torch import load_file

        super().__init__(signature)
        tensors = load_file(folder / files["model"])
        constants = {name: tensors.pop(name) for name in list(tensors) if name.startswith(CONSTANT)}
        self.threads = threads
        # In the order in which the exporter was given them.
        self.state = dict(sorted(tensors.items()))
        self.program = _deserialize(folder / files[_PROGRAM], constants)

    @torch.no_grad()
    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the program."""
        dtypes = [getattr(torch, info.dtype) for info in self.signature.inputs]
        values = [tensor.to("cpu", dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
        with torch_threads(self.threads or torch.get_num_threads()):
            try:
                outputs = self.program(self.state, values)
            except (RuntimeError, IndexError) as error:
                raise QuantizationError(
                    f"Expected inputs that the model can take, such as sequences that it has positions for, but {error}"
                ) from error
        device = tensors[0].device if tensors else torch.device("cpu")
        return [output.to(device) for output in outputs]


class _Functional(nn.Module):
    """Calls a module with tensors that come as an argument, so that its program has none of its own."""

    def __init__(self, flat: Flat) -> None:
        super().__init__()
        self.__dict__["flat"] = flat

    def forward(self, state: dict[str, Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        named = {f"module.{name}": tensor for name, tensor in state.items()}
        return functional_call(self.__dict__["flat"], named, tuple(tensors))


def export(
    module: nn.Module,
    signature: inspect.Signature,
    spec: CallSpec,
    tensors: list[Tensor],
    path: Path,
    *,
    dynamic: dict[str, dict[int, str]],
) -> None:
    """Write a module as tensors and a program.

    Args:
        module: with stored layers, or float, in eval mode.
        signature: of its forward.
        spec: of the call to export.
        tensors: of that call; sizes of dynamic dimensions are only examples.
        path: file of tensors to write; the program goes beside it.
        dynamic: input name to dimension to its name, for dimensions that may vary.

    Raises:
        ExportError: PyTorch's exporter refuses the module, with its reason.
    """
    from safetensors.torch import save_file

    state = state_of(module)
    # Which dimensions are equal, and how long they may get, is found by the exporter.
    open_dimension = torch.export.Dim.DYNAMIC
    shapes = [dict.fromkeys(dynamic.get(name, {}), open_dimension) for name in spec.names]
    examples = example_tensors(spec, tensors, dynamic)
    with exporting("PyTorch's exporter"):
        program = torch.export.export(
            _Functional(Flat(module, signature, spec).eval()),
            (state, examples),
            dynamic_shapes=(dict.fromkeys(state), shapes),
            strict=False,
        )
        text, constants = _serialize(program)
    (path.parent / _PROGRAM).write_bytes(gzip.compress(text, mtime=0))
    layers = {name: child.scheme.name for name, child in module.named_modules() if isinstance(child, StoredLayer)}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in {**state, **constants}.items()}
    # One entry, since the file has entries in no fixed order.
    save_file(contiguous, path, metadata={STRUCTURE: json.dumps({"layers": layers, "aliases": _aliases(module)})})


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of a module once, by name, those that `state_dict` leaves out among them."""
    return dict(sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()))


def check(path: Path) -> None:
    """Load a written program once.

    Raises:
        ExportError: it cannot be read.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        constants = {name: file.get_tensor(name) for name in file.keys() if name.startswith(CONSTANT)}  # noqa: SIM118
    try:
        _deserialize(path.parent / _PROGRAM, constants)
    except ArtifactError as error:
        raise ExportError(str(error)) from error


def standalone(files: dict[str, str], signature: Signature) -> str:
    """Return lines that run an artifact in its folder; its operators are this package's."""
    arguments = ", ".join(f"{name}=..." for name, _, default in signature.parameters if default == "required")
    return f"""# The operators of this runtime are lightning_quant's own, so the package must be installed.
import lightning_quant

model = lightning_quant.load(".")
output = model({arguments})
# The weights alone, by name: safetensors.torch.load_file({files["model"]!r})
"""


def count_operators(path: Path) -> dict[str, int]:
    """Return how often each operator occurs in a written program."""
    graph = json.loads(gzip.decompress((path.parent / _PROGRAM).read_bytes()))["graph_module"]["graph"]
    names = (node["target"].removeprefix("torch.ops.") for node in graph["nodes"])
    return dict(collections.Counter(names))


def _serialize(program: Any) -> tuple[bytes, dict[str, Tensor]]:
    from torch._export.serde import serialize

    program.example_inputs = None
    for node in program.graph.nodes:
        # What the exporter remembers of the user's code, with paths of this machine.
        node.meta = {key: value for key, value in node.meta.items() if key in ("val", "tensor_meta")}
    artifact = serialize.serialize(program)
    return artifact.exported_program, {f"{CONSTANT}{name}": value for name, value in program.constants.items()}


def _deserialize(path: Path, constants: dict[str, Tensor]) -> nn.Module:
    """Return the module of a program; tensors are passed beside the text, so that nothing is unpickled."""
    from torch._export.serde import serialize

    import lightning_quant.layers  # noqa: F401

    named = {name.removeprefix(CONSTANT): value for name, value in constants.items()}
    try:
        text = gzip.decompress(path.read_bytes())
        program = serialize.deserialize(serialize.SerializedArtifact(text, {}, named, b""))  # type: ignore[arg-type]
        module = program.module(check_guards=False)
    except (serialize.SerializeError, OSError, EOFError, LookupError, TypeError, ValueError, *_DAMAGE) as error:
        raise ArtifactError(
            f"Expected {path} to be a program for PyTorch {torch.__version__}, but {first_line(error)}."
        ) from error
    # They check shapes at each call, which the signature has done.
    module._forward_pre_hooks.clear()
    return module


def _aliases(module: nn.Module) -> dict[str, str]:
    """Return every further name of a tensor to the first."""
    first: dict[int, str] = {}
    aliases = {}
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return aliases
