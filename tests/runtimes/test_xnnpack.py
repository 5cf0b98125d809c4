"""QDQ graphs as XNNPACK reads them compute what they did."""

import torch
from prepared_graphs import evaluated
from torch import Tensor, nn

from lightning_quant.export.convert import convert
from lightning_quant.graph.qdq import BoundGraph
from lightning_quant.runtimes._xnnpack import as_xnnpack_reads_it

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
OPS = torch.ops.quantized_decomposed


class Twice(nn.Module):
    """Two layers read what one writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.one(y) + self.two(y)


def test_activations_are_int8_biases_float_and_no_two_readers_share_a_dequantization() -> None:
    torch.manual_seed(0)
    converted = convert(evaluated(Twice(), X))
    (bound,) = [module for module in converted.modules() if isinstance(module, BoundGraph)]
    program = torch.export.export(bound.graph_module, (X,)).run_decompositions({}).module()
    with torch.no_grad():
        expected = converted(X)
        graph_module = as_xnnpack_reads_it(program)  # type: ignore[arg-type]
        (actual,) = graph_module(X)

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    pair, channels = (OPS.quantize_per_tensor.default, OPS.dequantize_per_tensor.default), OPS.dequantize_per_channel
    targets = (*pair, channels.default)
    nodes = {target: [node for node in graph_module.graph.nodes if node.target is target] for target in targets}
    pairs = nodes[pair[0]] + nodes[pair[1]]
    assert {(node.args[3], node.args[4], node.args[5]) for node in pairs} == {(-128, 127, torch.int8)}
    assert {node.args[6] for node in nodes[channels.default]} == {torch.int8}
    assert all(len(node.users) == 1 for node in nodes[pair[1]])


def test_layers_over_more_dimensions_stand_between_quantized_rows() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6)
    converted = convert(evaluated(Twice(), x, runtime="executorch"))
    (bound,) = [module for module in converted.modules() if isinstance(module, BoundGraph)]
    program = torch.export.export(bound.graph_module, (x,)).module()
    with torch.no_grad():
        expected = converted(x)
        graph_module = as_xnnpack_reads_it(program)  # type: ignore[arg-type]
        (actual,) = graph_module(x)

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    layers = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert len(layers) == 3
    for layer in layers:
        assert layer.args[0].target is OPS.dequantize_per_tensor.default
        assert [user.target for user in layer.users] == [OPS.quantize_per_tensor.default]
