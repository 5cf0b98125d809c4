"""Parts that can be traced, inside one that cannot, inside a graph: in files they run in integers."""

from pathlib import Path

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
from prepared_graphs import evaluated, quantized_layers
from torch import Tensor, nn

from lightning_quant.export.convert import convert
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Passed(torch.autograd.Function):
    """A function of the user's own, which no graph holds."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


class Opaque(nn.Module):
    """Calls its parts around an operation that cannot be traced."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = Passed.apply(part(x))
        return x


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def nested() -> nn.Module:
    """Graphs in parts that cannot be traced in graphs, twice over, with one that is called twice and a shared layer."""
    torch.manual_seed(0)
    twice, shared = Opaque(block()), nn.Linear(8, 8)
    inner = nn.Sequential(nn.Linear(8, 8), Opaque(block(), shared), nn.Linear(8, 8))
    return nn.Sequential(nn.Linear(8, 8), Opaque(inner, block()), twice, shared, twice, nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch"])
def test_all_of_them_run_in_integers(runtime: str, tmp_path: Path) -> None:
    prepared = evaluated(nested(), X, runtime=runtime)
    artifact = export(prepared, tmp_path / "artifact")

    layers = {name for name, module in prepared.root.named_modules() if isinstance(module, nn.Linear)}
    rows = {row.name.removesuffix(".linear"): row for row in prepared.plan.rows}
    assert {rows[name].action for name in layers} == {"int8"}
    assert "nothing reads" not in str(prepared.plan)
    planned = tuple(operator for graph in prepared.plan.graphs for operator in graph.operators)
    assert len(planned) > len(layers)
    counts = prepared.runtime.count_operators(artifact.model_path)
    assert prepared.runtime.still_float(planned, counts) == {}


def test_what_is_trained_through_rounding_is_converted_with_them(tmp_path: Path) -> None:
    model = nested()
    prepared = prepare(model, (X,), runtime="onnxruntime")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    prepared.set_phase("fake_quantize")
    prepared.observing = True
    prepared.attach()
    model.train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    prepared.detach()
    converted = convert(prepared)

    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters() if "weight" in name)
    assert len(quantized_layers(converted)) == sum(len(graph.operators) for graph in prepared.plan.graphs)
    with torch.no_grad():
        assert 20 < signal_to_noise(model.eval()(X), converted(X)) < 80


def test_float_weights_are_left_where_something_reads_them_alone() -> None:
    converted = convert(evaluated(nested(), X))
    floating = [name for name, tensor in converted.state_dict().items() if tensor.dtype == torch.float32]
    assert floating
    assert all(name.endswith(("weight_scale", "bias_scale")) for name in floating)
