"""How long each operator of an OpenVINO model takes, as OpenVINO's own counters say it."""

import collections
import statistics
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_quant.graph.named_edges import PREFIX
from lightning_quant.graph.plan import Operator
from lightning_quant.runtimes._onnx_profile import edge_of, owner_of, profiled_calls

# What stands between an integer tensor and the operator that reads it, before OpenVINO fuses it away.
_DEQUANTIZING = ("Convert", "Subtract", "Multiply", "Reshape")
_SCALED = "/DequantizationMultiply"
_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")


def operator_ms(
    path: Path, inputs: dict[str, Tensor], operators: tuple[Operator, ...], compiled: Any
) -> dict[str, float]:
    """Return operator to the median of its milliseconds, as `Runtime.operator_ms`.

    Args:
        path: of the .xml.
        inputs: the model's own inputs by name.
        operators: of the plan.
        compiled: the model, compiled with `PERF_COUNT`.
    """
    import openvino

    graph = {op.get_friendly_name(): op for op in openvino.Core().read_model(path).get_ordered_ops()}
    fused = {
        node.get_friendly_name(): node.get_rt_info()["originalLayersNames"].astype(str).split(",")
        for node in compiled.get_runtime_model().get_ordered_ops()
    }
    values = [inputs[port.get_any_name()].detach().cpu().numpy() for port in compiled.inputs]
    request, spent = compiled.create_infer_request(), collections.defaultdict(list)
    for _ in profiled_calls():
        request.infer(values, share_inputs=True)
        for node in request.profiling_info:
            spent[node.node_name, node.node_type].append(node.real_time.total_seconds() * 1000)
    by_owner: dict[str, float] = collections.defaultdict(float)
    for (name, kind), durations in spent.items():
        # The first call is slower than all others.
        if (typical := statistics.median(durations[1:])) > 0:
            by_owner[_owner(fused.get(name, []), kind, graph, operators)] += typical
    return dict(by_owner)


def _owner(names: list[str], kind: str, graph: dict[str, Any], operators: tuple[Operator, ...]) -> str:
    """Return whose node this is, from the names of what was fused into it: an edge that it writes, or one it reads."""
    if kind == "FakeQuantize":
        return ""
    readers = {operator.reads[0]: operator.name for operator in operators if not operator.quantized_output}
    # OpenVINO names a product anew where it fuses a scale into it.
    ops = [graph[own] for name in names if (own := name.removesuffix(_SCALED)) in graph]
    read = next((readers[edge] for edge in map(_read, ops) if edge in readers), "")
    written = [name for name in names if name.startswith(PREFIX)]
    # An activation that is fused into a product is what writes the edge, and none of the plan's operators.
    if written and not (read and kind.startswith(_PRODUCTS)):
        return owner_of(written[-1], {operator.writes: operator.name for operator in operators})
    return read


def _read(op: Any) -> str:
    """Return the edge that an operator reads first; an empty text where there is none."""
    if not op.get_input_size():
        return ""
    source = op.input_value(0).get_node()
    while not source.get_friendly_name().startswith(PREFIX):
        if source.get_type_name() not in _DEQUANTIZING:
            return ""
        source = source.input_value(0).get_node()
    return edge_of(source.get_friendly_name())
