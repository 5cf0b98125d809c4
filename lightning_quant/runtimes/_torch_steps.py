"""A program as a list of calls of PyTorch's own operators, in JSON: written and read.

Nothing is unpickled or evaluated, and a dozen lines can run it (see `torch.standalone`). Each step is
`{"name", "call", "args", "kwargs"}` with a call of the closed list of `_torch_operators.py`; a value is a plain number,
text, list, None, or an object with one key: `{"value": name}` of a step, an input, or a tensor of the file beside it,
`{"torch": "quint8"}` for a constant of torch, `{"float": "inf"}` for what JSON has no number for. Sizes are computed by
steps as well. What no operator of the list does is refused when the program is written.
"""

import gzip
import json
import math
import operator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lightning_quant.arguments.reading import MAX_JSON_BYTES, gunzip, parse_json, read_bytes
from lightning_quant.errors import ArtifactError, ExportError
from lightning_quant.runtimes._torch_operators import name_of

FILE = "steps.json.gz"
"""Role of a static program's file; that of layers has another."""
TENSOR = "tensor."
"""How the names begin that steps have for tensors of the file beside them."""
_FORMAT = 1
_ATEN = torch.ops.aten
# Memory that nobody filled would show what lay there before.
_FILLED = {
    _ATEN.empty.memory_format: _ATEN.zeros.default,
    _ATEN.empty_permuted.default: _ATEN.zeros.default,
    _ATEN.empty_strided.default: _ATEN.zeros.default,
    _ATEN.empty_like.default: _ATEN.zeros_like.default,
    _ATEN.new_empty.default: _ATEN.new_zeros.default,
    _ATEN.new_empty_strided.default: _ATEN.new_zeros.default,
}
# Where the arguments that say how memory is laid out begin, beyond those of the filled form.
_NUM_SIZES = {_ATEN.empty_like.default: 1, _ATEN.new_empty.default: 2, _ATEN.new_empty_strided.default: 2}


def simplify(graph: fx.Graph) -> None:
    """Take out of an exported, functional graph what only checks or does nothing in evaluation."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _ATEN.dropout.default and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is _ATEN.copy_.default and not node.users and _is_state(node.args[0]):
            # A counter that the answer does not read, as capture has made sure: a file has no state.
            graph.erase_node(node)
        elif any(word in str(node.target) for word in ("_assert_", "sym_constrain_range", "_guards_fn")):
            graph.erase_node(node)
        elif node.target in _FILLED:
            node.args = node.args[: _NUM_SIZES.get(node.target, 1)]
            node.kwargs = {key: value for key, value in node.kwargs.items() if key in ("dtype", "layout", "device")}
            node.target = _FILLED[node.target]
    graph.eliminate_dead_code()


def _is_state(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def tensors_of(graph_module: fx.GraphModule, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors that a graph reads, by name with a prefix; steps have `TENSOR` before that."""
    attributes = {
        prefix + str(node.target): operator.attrgetter(str(node.target))(graph_module)
        for node in graph_module.graph.nodes
        if node.op == "get_attr"
    }
    return {name: value for name, value in attributes.items() if isinstance(value, Tensor)}


def write_steps(
    graph_module: fx.GraphModule, path: Path, described: dict[str, Any], placeholders: list[str], prefix: str = ""
) -> None:
    """Write a graph.

    Args:
        graph_module: of operators of the closed list alone, over flat tensors.
        path: file to write.
        described: what the file says besides: "engine" if there is a choice, and of each input and output its name,
            dtype and, for inputs, shape.
        placeholders: name of each input of the graph: one of the program's, or `TENSOR` and a tensor's of the file
            beside it.
        prefix: of the tensors that the graph holds, as for `tensors_of`.

    Raises:
        ExportError: a node calls something else; the message names it.
    """
    names: dict[fx.Node, str] = {}
    steps, results = [], None
    inputs = iter(placeholders)
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            names[node] = next(inputs)
        elif node.op == "get_attr":
            names[node] = TENSOR + prefix + str(node.target)
        elif node.op == "output":
            results = _encode(node.args[0], names)
        else:
            # Names of inputs are the user's, and have no dot.
            names[node] = f"step.{node.name}"
            step = {"name": names[node], "call": _call(node), "args": _encode(node.args, names)}
            kwargs = {key: _encode(value, names) for key, value in node.kwargs.items()}
            edge = {"edge": node.meta["edge"]} if node.meta.get("edge") else {}
            steps.append({**step, "kwargs": kwargs, **edge})
    write({"format": _FORMAT, **described, "steps": steps, "results": results}, path)


def write(program: dict[str, Any], path: Path) -> None:
    """Write a program that was read and changed.

    Raises:
        ExportError: it is longer than what is read again.
    """
    text = json.dumps(program, allow_nan=False).encode()
    if len(text) > MAX_JSON_BYTES:
        raise ExportError(
            f"Expected a program of at most {MAX_JSON_BYTES:,} bytes, but the module makes one of {len(text):,}: loops "
            'of Python are written step by step. Export a child module (`module="..."`).'
        )
    path.write_bytes(gzip.compress(text, mtime=0))


def read_steps(path: Path) -> dict[str, Any]:
    """Read a program.

    Raises:
        ArtifactError: the file is something else.
    """
    try:
        program = parse_json(gunzip(read_bytes(path, MAX_JSON_BYTES)))
        if not isinstance(program, dict) or program.get("format") != _FORMAT:
            raise ArtifactError("it is none of this version: quantize again.")
        needed = {key: program[key] for key in ("format", "inputs", "outputs", "steps", "results")}
        return {**needed, "engine": program.get("engine")}
    except (ArtifactError, LookupError) as error:
        raise ArtifactError(f"Expected {path} to be a program of steps, but {error}") from error


def unread_inputs(program: dict[str, Any]) -> frozenset[str]:
    """Return the names of the inputs that no step of a program reads, and that are no result."""
    read: set[str] = set()
    rest: list[Any] = [program["results"], *([step["args"], step["kwargs"]] for step in program["steps"])]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            read.update(item for key, item in value.items() if key == "value" and isinstance(item, str))
            rest += value.values()
        elif isinstance(value, list):
            rest += value
    return frozenset(info["name"] for info in program["inputs"]) - read


def _call(node: fx.Node) -> str:
    name = name_of(node.target) if node.op == "call_function" else None
    if name is None:
        called = getattr(node.target, "__name__", None) or str(node.target)
        raise ExportError(
            f"Expected the module to consist of PyTorch's own operators that only compute, but it calls {called}. "
            'Exclude it by naming a child module (`module="..."`), or choose another runtime.'
        )
    return name


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
