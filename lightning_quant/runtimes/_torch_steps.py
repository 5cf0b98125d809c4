"""A program as a list of calls of PyTorch's own operators, in JSON: written, read, and run.

Nothing is unpickled, and a dozen lines can run it (see `torch.standalone`). Each step is
`{"name", "call", "args", "kwargs"}`; a value is a plain number, text, list, None, or an object with one key:
`{"value": name}` of a step, an input, or a tensor of the file beside it, `{"torch": "quint8"}` for a constant of torch,
`{"float": "inf"}` for what JSON has no number for. What depends on no input, such as packed weights, is computed once.
"""

import gzip
import json
import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from lightning_quant.errors import ArtifactError, ExportError
from lightning_quant.runtimes._flat import first_line

FILE = "steps.json.gz"
_FORMAT = 1
_ROOTS = {"aten": torch.ops.aten, "quantized": torch.ops.quantized, "operator": operator}
# Arithmetic on sizes.
_PYTHON = frozenset({"add", "sub", "mul", "floordiv", "mod", "neg", "getitem"})
_TENSOR = "tensor."


def tensors_of(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    """Return the tensors that a graph reads, by the names that its steps have for them."""
    return {
        _TENSOR + str(node.target): operator.attrgetter(str(node.target))(graph_module)
        for node in graph_module.graph.nodes
        if node.op == "get_attr"
    }


def write_steps(graph_module: fx.GraphModule, path: Path, described: dict[str, Any]) -> None:
    """Write a lowered graph.

    Args:
        graph_module: of operators of PyTorch alone, over flat tensors.
        path: file to write.
        described: what the file says besides: "engine", and of each input and output its name, dtype and shape.

    Raises:
        ExportError: a node calls something else; the message names it.
    """
    names: dict[fx.Node, str] = {}
    steps, results = [], None
    inputs = iter(described["inputs"])
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            names[node] = next(inputs)["name"]
        elif node.op == "get_attr":
            names[node] = _TENSOR + str(node.target)
        elif node.op == "output":
            results = _encode(node.args[0], names)
        else:
            # Names of inputs are the user's, and have no dot.
            names[node] = f"step.{node.name}"
            step = {"name": names[node], "call": _call(node), "args": _encode(node.args, names)}
            kwargs = {key: _encode(value, names) for key, value in node.kwargs.items()}
            edge = {"edge": node.meta["edge"]} if "edge" in node.meta else {}
            steps.append({**step, "kwargs": kwargs, **edge})
    write({"format": _FORMAT, **described, "steps": steps, "results": results}, path)


def write(program: dict[str, Any], path: Path) -> None:
    """Write a program that was read and changed."""
    path.write_bytes(gzip.compress(json.dumps(program, allow_nan=False).encode(), mtime=0))


def read_steps(path: Path) -> dict[str, Any]:
    """Read a program.

    Raises:
        ArtifactError: the file is something else.
    """
    try:
        program = json.loads(gzip.decompress(path.read_bytes()))
        if program["format"] != _FORMAT:
            raise ValueError(f"its format is {program['format']!r}")
        return {key: program[key] for key in ("format", "engine", "inputs", "outputs", "steps", "results")}
    except (OSError, EOFError, ValueError, LookupError, TypeError, *_DAMAGE) as error:
        raise ArtifactError(f"Expected {path} to be a program of steps, but {first_line(error)}.") from error


def build(program: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> fx.GraphModule:
    """Return a program as a module over flat tensors, for the engine that is set now.

    Args:
        program: as read.
        tensors: what the file beside it holds.
        path: where the program comes from, for messages.

    Raises:
        ArtifactError: a step is none that this PyTorch can carry out.
    """
    graph = fx.Graph()
    constants: dict[str, Any] = {}
    values: dict[str, Any] = dict(tensors)
    try:
        for info in program["inputs"]:
            values[info["name"]] = graph.placeholder(f"input_{len(graph.nodes)}")
        for step in program["steps"]:
            function = _function(step["call"])
            args = _decode(step["args"], values)
            kwargs = {key: _decode(value, values) for key, value in step["kwargs"].items()}
            if not _has_nodes((args, kwargs)):
                values[step["name"]] = function(*args, **kwargs)
                continue
            args, kwargs = map_aggregate((args, kwargs), lambda value: _as_attribute(value, graph, constants))
            node = values[step["name"]] = graph.call_function(function, tuple(args), kwargs)
            node.meta["edge"] = step.get("edge")
        results = _decode(program["results"], values)
        if not isinstance(results, list) or len(results) != len(program["outputs"]):
            raise ValueError(f"it gives {results!r:.80} for {len(program['outputs'])} outputs")
        graph.output(map_aggregate(results, lambda value: _as_attribute(value, graph, constants)))
        graph.lint()
    except (LookupError, TypeError, ValueError, *_DAMAGE) as error:
        raise ArtifactError(
            f"Expected {path} to be a program for PyTorch {torch.__version__}, but {first_line(error)}."
        ) from error
    return fx.GraphModule(constants, graph)


@contextmanager
def quantized_engine(name: str) -> Iterator[None]:
    """Let PyTorch use the kernels of one engine for the time of a block.

    Under deterministic algorithms PyTorch refuses to resize quantized tensors, since their memory is not filled before;
    the kernels fill all of it.
    """
    before, deterministic = torch.backends.quantized.engine, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.backends.quantized.engine = name
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


class Forced(fx.Interpreter):
    """Runs a program with given integers in place of those that its operators compute.

    Attributes:
        computed: edge to the integers that its producer made of the given ones.
    """

    def __init__(self, graph_module: fx.GraphModule, edges: list[Tensor]) -> None:
        super().__init__(graph_module)
        self.edges = edges
        self.computed: dict[int, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Keep what a node computes, and go on with what is given."""
        result = super().run_node(n)
        edge = n.meta.get("edge")
        if edge is None:
            return result
        self.computed[edge] = result.int_repr()
        return torch._make_per_tensor_quantized_tensor(self.edges[edge], result.q_scale(), result.q_zero_point())


# What PyTorch raises, beside Python's own errors, when it is given what an operator does not take.
_DAMAGE = (AttributeError, RuntimeError, AssertionError)


def _call(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _ROOTS:
        return f"{target.namespace}.{target.name().rpartition('::')[2].partition('.')[0]}.{target._overloadname}"
    name = getattr(target, "__name__", str(target))
    if getattr(operator, name, None) is target and name in _PYTHON:
        return f"operator.{name}"
    raise ExportError(
        f"Expected the module to consist of PyTorch's own operators, but it calls {name}. Exclude it by naming a child "
        'module (`module="..."`), or choose another runtime.'
    )


def _function(call: str) -> Any:
    root, _, name = call.partition(".")
    if root not in _ROOTS or (root == "operator" and name not in _PYTHON):
        raise ValueError(f"{call!r} is no operator of PyTorch")
    function = operator.attrgetter(name)(_ROOTS[root])
    if root != "operator" and not isinstance(function, torch._ops.OpOverload):
        raise ValueError(f"{call!r} is no operator of PyTorch")
    return function


def _encode(value: Any, names: dict[fx.Node, str]) -> Any:
    if isinstance(value, fx.Node):
        return {"value": names[value]}
    if isinstance(value, list | tuple):
        return [_encode(item, names) for item in value]
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return "cpu"
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ExportError(f"Expected arguments of operators to be plain values, but got {type(value).__name__}.")


def _decode(value: Any, values: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_decode(item, values) for item in value]
    if isinstance(value, dict):
        ((kind, name),) = value.items()
        if kind == "value":
            return values[name]
        if kind == "float":
            return float(name)
        constant = getattr(torch, name)
        if kind != "torch" or not isinstance(constant, torch.dtype | torch.memory_format | torch.layout):
            raise ValueError(f"{value!r} is no value")
        return constant
    return value


def _has_nodes(tree: Any) -> bool:
    found: list[fx.Node] = []
    map_arg(tree, found.append)
    return bool(found)


def _as_attribute(value: Any, graph: fx.Graph, constants: dict[str, Any]) -> Any:
    """Let a graph read a tensor or packed weight from its module, once for each."""
    if not isinstance(value, Tensor | torch.ScriptObject):
        return value
    name = next((name for name, known in constants.items() if known is value), f"constant_{len(constants)}")
    constants[name] = value
    return graph.get_attr(name)
