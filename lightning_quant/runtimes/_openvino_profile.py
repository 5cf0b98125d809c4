"""How long each operator of an OpenVINO model takes, as OpenVINO's own counters say it."""

import collections
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_quant.graph.named_edges import PREFIX, edge_of
from lightning_quant.graph.plan import Operator
from lightning_quant.runtimes._onnx_profile import owner_of, products_of, profiled_calls

# What stands between an edge and the product that reads it, before OpenVINO fuses it away.
_PASSED = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
_SCALED = "/DequantizationMultiply"
_PRODUCTS = ("Convolution", "ConvolutionBackpropData", "GroupConvolution", "GroupConvolutionBackpropData", "MatMul")


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

    products = products_of(_products(openvino.Core().read_model(path)), operators)
    writers = {operator.writes: operator.name for operator in operators}
    fused = {
        node.get_friendly_name(): node.get_rt_info()["originalLayersNames"].astype(str).split(",")
        for node in compiled.get_runtime_model().get_ordered_ops()
    }
    values = [inputs[port.get_node().get_friendly_name()].detach().cpu().numpy() for port in compiled.inputs]
    request, spent = compiled.create_infer_request(), collections.defaultdict(list)
    for _ in profiled_calls():
        request.infer(values, share_inputs=True)
        for node in request.profiling_info:
            spent[node.node_name, node.node_type].append(node.real_time.total_seconds() * 1000)
    by_owner: dict[str, float] = collections.defaultdict(float)
    for (name, kind), durations in spent.items():
        # The first call is slower than all others.
        if (typical := statistics.median(durations[1:])) > 0:
            by_owner[_owner(fused.get(name, []), kind, products, writers)] += typical
    return dict(by_owner)


def _owner(names: list[str], kind: str, products: dict[str, str], writers: dict[str, str]) -> str:
    """Return whose node this is, from the names of what was fused into it: an edge that it writes, or a product."""
    if kind == "FakeQuantize":
        return ""
    # OpenVINO names a product anew where it fuses a scale into it. An activation that is fused into one is what writes
    # the edge, and none of the plan's operators.
    product = next((products[own] for name in names if (own := name.removesuffix(_SCALED)) in products), "")
    written = [name for name in names if name.startswith(PREFIX)]
    return product or (owner_of(written[-1], writers) if written else "")


def _products(model: Any) -> Iterator[tuple[str, str]]:
    """Yield the products of a model in the order of execution, with the edge that each reads first."""
    # OpenVINO has them in an order of its own; the exporter numbered them.
    for op in sorted(model.get_ordered_ops(), key=lambda op: _number(op.get_friendly_name())):
        source = op.input_value(0).get_node() if op.get_type_name() in _PRODUCTS else None
        while source is not None and not source.get_friendly_name().startswith(PREFIX):
            is_passed = source.get_type_name() in _PASSED
            source = source.input_value(0).get_node() if is_passed else None
        if source is not None:
            yield op.get_friendly_name(), edge_of(source.get_friendly_name())


def _number(name: str) -> int:
    """Return the number that PyTorch's exporter gave a node: "node_linear", "node_linear_1", ..."""
    number = name.partition("/")[0].rpartition("_")[2]
    return int(number) if number.isdecimal() else 0
