"""How long each operator of an ONNX file takes, as ONNX Runtime's profiler says it."""

import collections
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_quant.graph.named_edges import PREFIX, edge_of
from lightning_quant.graph.plan import Operator, join
from lightning_quant.machine.disk import scratch_folder

# Calls that are profiled after one that is not, and seconds after which no other one begins.
_CALLS, _SECONDS = 8, 0.5
# What runs in the kernel of the operator in front of it.
_FUSED = ("Relu", "Clip")
_KERNEL = "_kernel_time"
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What stands between an edge and the product that reads it, and keeps its values.
_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")


def operator_ms(
    path: Path, inputs: dict[str, Tensor], operators: tuple[Operator, ...], session: Callable[[Path, Path], Any]
) -> dict[str, float]:
    """Return operator to the median of its milliseconds, as `Runtime.operator_ms`.

    Args:
        path: an ONNX file in QDQ form.
        inputs: the model's own inputs by name.
        operators: of the plan.
        session: starts a session of a file that profiles to a path.
    """
    import onnx

    owners = _owners(onnx.load(path, load_external_data=False).graph, operators)
    spent: dict[str, list[float]] = collections.defaultdict(list)
    with scratch_folder() as folder:
        running = session(path, folder / "profile")
        values = {info.name: inputs[info.name].detach().cpu().numpy() for info in running.get_inputs()}
        for _ in profiled_calls():
            running.run(None, values)
        events = json.loads(Path(running.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            spent[event["name"].removesuffix(_KERNEL)].append(event["dur"] / 1000)
    by_owner: dict[str, float] = collections.defaultdict(float)
    for node, durations in spent.items():
        # The first call is slower than all others.
        by_owner[_owner(node, owners)] += statistics.median(durations[1:] or durations)
    return dict(by_owner)


def profiled_calls() -> Iterator[int]:
    """Count the calls of which the first does not count: two at least, and no more than take half a second."""
    started = time.perf_counter()
    for number in range(_CALLS + 1):
        if number >= 2 and time.perf_counter() - started > _SECONDS:
            return
        yield number


def owner_of(name: str, writers: dict[str, str]) -> str:
    """Return the row of a node that quantizes an edge: whose result that is, of the plan's operators or of others."""
    edge = edge_of(name)
    return writers.get(edge) or join(*edge.split(":", 1))


def _owner(node: str, owners: dict[str, str]) -> str:
    """Return whose node this is: optimizers put something behind the name that it has in the file."""
    while node not in owners and "_" in node:
        node = node.rpartition("_")[0]
    return owners.get(node, "")


def _owners(graph: Any, operators: tuple[Operator, ...]) -> dict[str, str]:
    """Return name of a node to the name of the row that it belongs to, as far as quantized tensors tell."""
    made = {output: node for node in graph.node for output in node.output}
    writers = {operator.writes: operator.name for operator in operators}
    owners: dict[str, str] = {node.name: "" for node in graph.node}
    for node in graph.node:
        if node.name.startswith(PREFIX):
            source = made.get(node.input[0])
            while source is not None and source.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                owners[source.name] = owner_of(node.name, writers)
                source = made.get(source.input[0]) if source.op_type in _FUSED else None
    owners.update(products_of(_products(graph, made), operators))
    return owners


def _products(graph: Any, made: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the products of a graph in the order of execution, with the edge that each reads first."""
    for node in graph.node:
        source = made.get(node.input[0]) if node.op_type in _PRODUCTS else None
        while source is not None and source.op_type in (*_MOVES, "DequantizeLinear"):
            source = made.get(source.input[0])
        if source is not None and source.name.startswith(PREFIX):
            yield node.name, edge_of(source.name)


def products_of(products: Iterable[tuple[str, str]], operators: tuple[Operator, ...]) -> dict[str, str]:
    """Return name of a node to the row of the operator that it is, of those that answer in float: what reads an edge.

    Args:
        products: name of a node and the edge that it reads, in the order of execution.
        operators: of the plan, in that order.
    """
    readers: dict[str, list[str]] = collections.defaultdict(list)
    nodes: dict[str, list[str]] = collections.defaultdict(list)
    for operator in operators:
        if not operator.quantized_output:
            readers[operator.reads[0]].append(operator.name)
    for name, edge in products:
        nodes[edge].append(name)
    # Query, key and value read one tensor. Where a file has them in another number, nothing tells which is which.
    alike = [edge for edge in readers if len(readers[edge]) == len(nodes[edge])]
    return {node: name for edge in alike for node, name in zip(nodes[edge], readers[edge], strict=True)}
