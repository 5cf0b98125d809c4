"""Quantizers stand in a graph where its plan has edges and operators."""

import torch
from models import ResidualNet
from torch import nn

from lightning_quant.export.prepare import prepare
from lightning_quant.graph.instrument import instrument
from lightning_quant.surgery.routing import clone

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_every_edge_and_weight_of_the_plan_is_rounded_once() -> None:
    prepared = prepare(ResidualNet().eval(), (IMAGE,))
    (island,) = prepared.islands.values()
    made = instrument(prepared.root, island, island.spec, island.tensors)
    called = [str(node.target) for node in made.graph.nodes if node.op == "call_method"]

    assert set(made.edges) == {edge.identity for edge in island.plan.edges if not edge.passed}
    assert set(made.operators) == {operator.identity for operator in island.plan.operators if operator.weight}
    assert called.count("run_layer") == len(made.operators)
    assert called.count("quantize_edge") + called.count("quantize_relu") == len(made.edges)


def test_a_function_holds_no_module_but_takes_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    prepared = prepare(model, (torch.randn(3, 4),))
    (island,) = prepared.islands.values()
    made = instrument(prepared.root, island, island.spec, island.tensors)

    class Plain:
        """Carries out what stands in the graph, without rounding."""

        def run_layer(self, identity: str, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return layer(x)

        def quantize_edge(self, identity: str, x: torch.Tensor) -> torch.Tensor:
            return x

    other, x = clone(model), torch.randn(3, 4)
    other[1].bias = nn.Parameter(torch.ones(2))
    (result,) = made.function(other, Plain(), x)
    assert torch.equal(result, other(x))
