"""Code of graphs is right whatever their modules are called."""

import pytest
import torch
from torch import Tensor, fx, nn

from lightning_quant.graph.code import clear_of_own_names, with_any_names


class Named(nn.Module):
    """A layer under any name that `add_module` takes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self._modules[self.name](x)


@pytest.mark.parametrize("name", ["layer", "two words", 'a "quote"', "class", "back\\slash", "größe", "3", "self"])
def test_layers_of_any_name_are_called(name: str) -> None:
    module, x = Named(name), torch.randn(3, 4)
    graph = fx.Graph()
    called = graph.call_module(name, (graph.placeholder("x"),))
    graph.output(graph.call_function(torch.add, (called, graph.get_attr(f"{name}.bias"))))

    assert torch.equal(fx.GraphModule(module, with_any_names(graph))(x), module(x) + module._modules[name].bias)


def test_children_called_like_a_graphs_own_attributes_get_other_names() -> None:
    module, x = Named("graph"), torch.randn(3, 4)
    graph = fx.Graph()
    graph.output(graph.call_module("graph", (graph.placeholder("x"),)))

    assert clear_of_own_names(graph, module) == ["child_graph"]
    assert torch.equal(fx.GraphModule(module, graph)(x), module(x))
