"""Parts of a graph that are called with dataclasses: rebuilt as they were, whatever their class makes of arguments."""

from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calls.calls import flatten_call
from lightning_quant.graph.analyze import own_signature


@dataclass
class _Graph:
    """Made from parts; calling the class with its fields would fail."""

    parts: InitVar[list[Tensor]]
    nodes: Tensor = field(init=False)
    count: int = field(init=False)

    def __post_init__(self, parts: list[Tensor]) -> None:
        self.nodes, self.count = torch.cat(parts), len(parts)


@dataclass
class _Batch:
    """Can be called, as batches of graphs can."""

    nodes: Tensor

    def __call__(self) -> Tensor:
        return self.nodes


class _Passing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.register_forward_hook(lambda *_: None)

    def forward(self, graph: _Graph) -> Tensor:
        return self.inner(graph.nodes) * graph.count


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Names of what a graph module has for itself.
        self.graph, self.code = _Passing(), nn.Linear(6, 2)

    def forward(self, graph: _Graph) -> Tensor:
        return self.code(torch.relu(self.graph(graph)))


def test_a_part_gets_the_object_that_it_was_called_with(tmp_path: object) -> None:
    torch.manual_seed(0)
    model = _Net().eval()
    calls = [_Graph([torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))] * 2) for seed in range(1)]

    artifact = lq.quantize(model, "int8", calibration_data=[(call,) for call in calls], output_dir=tmp_path, threads=1)

    with torch.no_grad():
        expected = model(calls[0])
        torch.testing.assert_close(lq.load(artifact.path)(calls[0]), expected, rtol=0.0, atol=0.1)


def test_objects_that_can_be_called_are_structures() -> None:
    spec, tensors = flatten_call(own_signature(_Net()), (_Holder(_Batch(torch.ones(2, 6))),), {})
    assert spec.names == ("graph_batch_nodes",)
    assert len(tensors) == 1


class _Holder:
    """No dataclass, and callable."""

    def __init__(self, batch: _Batch) -> None:
        self.batch = batch

    def __call__(self) -> None: ...
