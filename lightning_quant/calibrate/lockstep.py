"""Run a prepared graph operator by operator for all calls at once, in float and quantized side by side.

So that an algorithm can look at what a layer reads in every call, change it, and let later layers see the change.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from lightning_quant.calls.calls import Call, flatten_call
from lightning_quant.graph.moves import border_of
from lightning_quant.graph.plan import Operator
from lightning_quant.graph.qdq import layer_options
from lightning_quant.graph.size_conditions import decides
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode, resolve

_WEIGHTED = ("run_layer", "run_function")


@dataclass(frozen=True)
class Site:
    """A weighted operator about to run.

    Attributes:
        identity: of the operator.
        operator: its row of the plan.
        options: stride, padding, dilation and groups of a convolution.
        float_inputs: what it reads in the float model, one tensor per call, on the grid's scale but not rounded; with
            the padding of a convolution that pads with values of its input.
        quantized_inputs: what it reads in the quantized model; empty when that does not run.
    """

    identity: str
    operator: Operator
    options: dict[str, Any]
    float_inputs: list[Tensor]
    quantized_inputs: list[Tensor]

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the operator with another weight and bias."""
        return getattr(F, self.operator.kind)(x, weight, bias, **self.options)

    @property
    def channel_axis(self) -> int:
        """Dimension of the channels in what the operator returns."""
        return -1 if self.operator.kind == "linear" else 1


@dataclass
class _Run:
    """One call on its way through the graph, in one phase."""

    phase: str
    tensors: list[Tensor]
    values: dict[fx.Node, Any] = field(default_factory=dict)
    integers: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def lockstep(prepared: Prepared, calls: list[Call], visit: Callable[[Site], None], *, quantized: bool = True) -> None:
    """Run calls of the module and visit every weighted operator, in the order of execution, before it runs.

    Where only parts of the module can be traced, each part runs on what it reads in the float model.

    Args:
        prepared: detached, calibrated when `quantized`.
        calls: of the module, all of the captured structure.
        visit: may change layers and bias corrections of the operator it is given.
        quantized: whether to run the quantized model beside the float one.
    """
    with evaluation_mode(prepared.root):
        for path, tensors in _calls_of_islands(prepared, calls).items():
            _run_island(prepared, path, tensors, visit, quantized=quantized)


def _calls_of_islands(prepared: Prepared, calls: list[Call]) -> dict[str, list[Call]]:
    if list(prepared.islands) == [""]:
        return {"": calls}
    seen: dict[str, list[Call]] = {path: [] for path in prepared.islands}

    def hook(path: str) -> Any:
        return resolve(prepared.root, path).register_forward_pre_hook(
            lambda _, args, kwargs: seen[path].append(Call(args, kwargs)), with_kwargs=True
        )

    handles = [hook(path) for path in prepared.islands]
    try:
        for args, kwargs in calls:
            prepared.root(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: calls for path, calls in seen.items() if calls}


def _run_island(
    prepared: Prepared, path: str, calls: list[Call], visit: Callable[[Site], None], *, quantized: bool
) -> None:
    island, module = prepared.islands[path], resolve(prepared.root, path)
    flat = [flatten_call(island.signature, args, kwargs) for args, kwargs in calls]
    spec = flat[0][0]
    same = [tensors for other, tensors in flat if other.key() == spec.key()]
    graph = prepared.graph(path, spec, same[0]).graph
    if decides(graph):
        same = [tensors for tensors in same if [t.shape for t in tensors] == [t.shape for t in same[0]]]
    runs = [_Run(phase, tensors) for phase in (("off", "frozen") if quantized else ("off",)) for tensors in same]
    last_readers = _last_readers(graph)
    before = prepared.phase, prepared.simulation.integers
    try:
        for node in graph.nodes:
            if node.target in _WEIGHTED and node.op == "call_method":
                visit(_site(prepared, module, node, runs))
            for run in runs:
                prepared.control.phase, prepared.simulation.integers = run.phase, run.integers
                _step(node, run, prepared, module)
                for read in last_readers.get(node, ()):
                    del run.values[read]
    finally:
        prepared.control.phase, prepared.simulation.integers = before


def _site(prepared: Prepared, module: nn.Module, node: fx.Node, runs: list[_Run]) -> Site:
    identity = str(node.args[1])
    operator = prepared.operators[identity]
    in_layer = node.target == "run_layer"
    layer = module.get_submodule(str(node.args[2].target)) if in_layer else None  # type: ignore[union-attr]
    source = node.args[3 if in_layer else 2] if "x" not in node.kwargs else node.kwargs["x"]
    edge = operator.reads[0]
    inputs: dict[str, list[Tensor]] = {"off": [], "frozen": []}
    border = border_of(layer)
    for run in runs:
        x = prepared.on_grid(edge, run.values[source].float())  # type: ignore[index]
        inputs[run.phase].append(x if border is None else F.pad(x, *border))
    return Site(identity, operator, layer_options(node, operator, layer), inputs["off"], inputs["frozen"])


def _step(node: fx.Node, run: _Run, prepared: Prepared, module: nn.Module) -> None:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda read: run.values[read])
    if node.op == "placeholder":
        position = sum(1 for other in run.values if other.op == "placeholder")
        run.values[node] = prepared.simulation if position == 0 else run.tensors[position - 1]
    elif node.op == "get_attr":
        run.values[node] = functools.reduce(getattr, str(node.target).split("."), module)
    elif node.op == "call_function":
        run.values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    elif node.op == "call_method":
        run.values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    elif node.op == "call_module":
        run.values[node] = module.get_submodule(str(node.target))(*args, **kwargs)


def _last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return node to the values that nobody reads after it; the placeholders stay, since they are counted."""
    seen: set[fx.Node] = set()
    last: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for read in node.all_input_nodes:
            if read not in seen and read.op != "placeholder":
                seen.add(read)
                last.setdefault(node, []).append(read)
    return last
