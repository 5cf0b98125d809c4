"""Put quantizers into a traced graph and make it a function.

The function takes the module, the `Simulation` and the call's tensors: it holds no module and no tensor of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from lightning_quant.calls.calls import CallSpec, ResultSpec
from lightning_quant.graph.analyze import Island
from lightning_quant.graph.code import with_any_names
from lightning_quant.graph.operations import argument, describe
from lightning_quant.graph.plan import Operator
from lightning_quant.graph.rereads import insert_rereads
from lightning_quant.graph.trace import trace


@dataclass(frozen=True)
class Instrumented:
    """A graph with quantizers, the same as a function, and how its leaves make up the result.

    Attributes:
        graph: the graph.
        function: takes module, what carries out the operators, and the call's tensors.
        output_spec: how the leaves make up the result.
        edges: identities of the edges that are rounded in it, in the order of execution.
        operators: identities of the weighted operators in it.
    """

    graph: fx.Graph
    function: Callable[..., Any]
    output_spec: ResultSpec
    edges: tuple[str, ...]
    operators: tuple[str, ...]


def instrument(module: nn.Module, island: Island, spec: CallSpec, tensors: list[Tensor]) -> Instrumented:
    """Trace a module under its present flags and put the quantizers in."""
    traced = trace(module, spec, tensors, set(island.opaque))
    graph = traced.graph
    keys = {}
    for node in graph.nodes:
        key = island.keys.get(node.meta.get("site"))
        if key is not None:
            keys[key] = node
    insert_rereads(island, keys)
    nodes = list(graph.nodes)
    with graph.inserting_before(nodes[0]):
        simulation = graph.placeholder("lightning_quant_simulation")
    for operator in island.plan.operators:
        if operator.weight and operator.key in keys:
            _quantize_weight(graph, simulation, keys[operator.key], operator.identity)
        if operator.kind == "add" and len(operator.inputs) == 2 and operator.key in keys:
            node = keys[operator.key]
            _call(graph, simulation, node, "run_add", (operator.identity, *node.args[:2]))
        if operator.batch_norm in keys:
            _run_batch_norm(graph, simulation, keys[operator.batch_norm], operator.identity)
        _run_activation(graph, simulation, keys.get(operator.activation), operator, module)
        for index, affine in enumerate(operator.affine):
            if (step := keys.get(affine.key)) is not None:
                x, value = step.args[affine.position], step.args[1 - affine.position]
                _call(graph, simulation, step, "run_affine", (operator.identity, index, x, value))
    places = {node: place for place, node in enumerate(nodes)}
    edges = [edge for edge in island.plan.edges if edge.key in keys and not edge.passed]
    edges.sort(key=lambda edge: places[keys[edge.key]])
    for edge in edges:
        _quantize_edge(graph, simulation, keys[edge.key], edge.identity, module)
    graph.lint()
    return Instrumented(
        graph,
        _function_of(graph),
        traced.output_spec,
        tuple(edge.identity for edge in edges),
        tuple(o.identity for o in island.plan.operators if o.weight and o.key in keys),
    )


def _run_batch_norm(graph: fx.Graph, simulation: fx.Node, node: fx.Node, identity: str) -> None:
    if node.op == "call_module":
        called = identity, _module_reference(graph, node), argument(node, 0, "input")
        _call(graph, simulation, node, "run_batch_norm", called)
        return
    node.op, node.target = "call_method", "run_functional_batch_norm"
    node.args, node.kwargs = (simulation, identity, *node.args), _renamed(node.kwargs)


def _run_activation(
    graph: fx.Graph, simulation: fx.Node, node: fx.Node | None, operator: Operator, module: nn.Module
) -> None:
    """Call an activation by way of the simulation where a range takes it over; a ReLU is rounded with its edge."""
    if node is None or node.op != "call_module" or not operator.quantized_output:
        return
    if describe(node, module).kind != "relu":
        called = operator.writes, _module_reference(graph, node), argument(node, 0, "input")
        _call(graph, simulation, node, "run_activation", called)


def _renamed(kwargs: Any) -> dict[str, Any]:
    """Return a function's arguments by keyword as the simulation calls them."""
    return {"x" if name == "input" else name: value for name, value in kwargs.items()}


def _module_reference(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Insert a reference to the module that a node calls, looked up in the user's tree at each call."""
    with graph.inserting_before(node):
        return graph.create_node("get_attr", str(node.target))


def _quantize_weight(graph: fx.Graph, simulation: fx.Node, node: fx.Node, identity: str) -> None:
    if node.op == "call_module":
        _call(
            graph, simulation, node, "run_layer", (identity, _module_reference(graph, node), argument(node, 0, "input"))
        )
        return
    node.op, node.target = "call_method", "run_function"
    node.args, node.kwargs = (simulation, identity, *node.args), _renamed(node.kwargs)


def _call(graph: fx.Graph, simulation: fx.Node, node: fx.Node, method: str, args: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        node.op, node.target, node.args, node.kwargs = "call_method", method, (simulation, *args), {}


def _quantize_edge(graph: fx.Graph, simulation: fx.Node, node: fx.Node, identity: str, module: nn.Module) -> None:
    if describe(node, module).kind == "relu":
        # Rounding to a range that begins at zero does what the ReLU does.
        relu = _module_reference(graph, node) if node.op == "call_module" else None
        _call(graph, simulation, node, "quantize_relu", (identity, relu, argument(node, 0, "input")))
        return
    readers = list(node.users)
    with graph.inserting_after(node):
        rounded = graph.call_method("quantize_edge", (simulation, identity, node))
    for reader in readers:
        reader.replace_input_with(node, rounded)


def _function_of(graph: fx.Graph) -> Callable[..., Any]:
    code = with_any_names(graph).python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<lightning_quant graph>", "exec"), namespace)
    return namespace["forward"]
