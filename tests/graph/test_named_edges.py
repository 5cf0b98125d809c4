"""Quantizers keep the names of the plan's edges."""

import functools
from pathlib import Path

import pytest
import torch
from models import ResidualNet, with_statistics
from prepared_graphs import evaluated
from torch import Tensor, nn

from lightning_quant import load
from lightning_quant.export.convert import convert
from lightning_quant.export.export import export
from lightning_quant.graph.named_edges import EdgeQuantizer
from lightning_quant.recipe.recipe import Recipe

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


UNCORRECTED = Recipe(name="uncorrected", bias_correction=False)


ready = functools.partial(evaluated, recipe=UNCORRECTED)


def test_every_edge_has_one_pair_on_its_grid() -> None:
    prepared = ready(with_statistics(ResidualNet()), IMAGE)
    converted = convert(prepared).graph_module
    graph = converted.graph
    modules = dict(converted.named_modules())
    quantize = [n for n in graph.nodes if n.op == "call_module" and isinstance(modules[n.target], EdgeQuantizer)]
    grids = {node: modules[node.target].grid for node in quantize}
    dequantize = [n for n in graph.nodes if n.target == torch.ops.quantized_decomposed.dequantize_per_tensor.default]
    assert len(quantize) == len(dequantize) == len(prepared.ranges.edges)
    expected = {(float(s), int(z)) for s, z in (prepared.ranges.parameters(i) for i in prepared.ranges.edges)}
    assert {grid[:2] for grid in grids.values()} == expected
    assert {grid[2:] for grid in grids.values()} == {(0, 255, torch.uint8)}
    assert all(node.args[1:] == grids[node.args[0]] for node in dequantize)
    assert all(set(node.users) <= set(dequantize) for node in quantize)


class LastStep(nn.Module):
    """Steps through time and answers with the last step: exporters leave out those before."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        for step in range(x.shape[1]):
            y = self.net(x[:, step])
        return y


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("torch", marks=pytest.mark.slow)])
def test_steps_that_nothing_reads_are_no_other_steps(runtime: str, tmp_path: Path) -> None:
    x = torch.arange(1.0, 4.0)[:, None] * torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    prepared = ready(LastStep().eval(), x, runtime=runtime)
    artifact = export(prepared, tmp_path / "artifact")
    parity = prepared.parity(load(artifact.path), artifact.model_path)
    assert parity.worst_operator
    assert parity.failures == []
