"""BatchNorms that are no layer of PyTorch's, or do not follow their layer directly, fold as others do."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import with_statistics
from test_moves import agreement, ready
from torch import Tensor, fx, nn

from lightning_quant.export.convert import convert
from lightning_quant.export.prepare import prepare

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class NormAndActivation(nn.BatchNorm2d):
    """As timm has it: PyTorch's own forward, copied, and an activation behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        in_training = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, in_training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class Plain(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class OtherNames(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-0.5, 0.5, channels))
        self.register_buffer("spread", torch.linspace(0.5, 2, channels))
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.spread, weight=self.gamma, eps=1e-3)


class Counting(Plain):
    """As older code counts: by a new value of the buffer, or in place."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked = self.num_batches_tracked + 1
            self.num_batches_tracked += 1
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


class LinearNorm(nn.Module):
    """As LeViT has it: features of tokens are normalized as if each were a sample."""

    def __init__(self, features: int, transposes: bool = False) -> None:
        super().__init__()
        self.linear, self.norm, self.transposes = nn.Linear(features, 6, bias=False), nn.BatchNorm1d(6), transposes

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.transposes:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


class Tokens(nn.Module):
    def __init__(self, transposes: bool = False) -> None:
        super().__init__()
        self.first, self.second = LinearNorm(5, transposes), LinearNorm(6, transposes)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def convolutional(norm: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.Conv2d(8, 4, 1)))


def normalizations(model: nn.Module) -> list[str]:
    graphs = [child.graph for child in model.modules() if isinstance(child, fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    return [str(node.target) for node in nodes if "norm" in str(node.target) or "1.act" in str(node.target)]


@pytest.mark.parametrize("norm", [NormAndActivation, Plain, OtherNames, Counting])
def test_batch_norms_that_are_functions_fold(norm: type[nn.Module]) -> None:
    prepared = ready(convolutional(norm), IMAGE)
    assert not normalizations(convert(prepared))
    # The same but for ties.
    assert agreement(prepared, IMAGE) > 50
    (graph,) = prepared.plan.graphs
    assert graph.operators[0].norm is not None


def test_statistics_that_forward_computes_do_not_fold() -> None:
    class Scaled(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean * 0.5, self.running_var, self.weight, self.bias)

    prepared = ready(convolutional(Scaled), IMAGE)
    (row,) = (row for row in prepared.plan.rows if row.kind == "batch_norm")
    assert (row.action, row.reason) == ("float", "its statistics are computed in forward")


@pytest.mark.parametrize("norm", [NormAndActivation, Plain, Counting])
def test_training_through_rounding_updates_them_as_in_float(norm: type[nn.Module]) -> None:
    model, peer = convolutional(norm).train(), convolutional(norm).train()
    prepared = ready(model, IMAGE)
    model.train()
    with prepared.attached("off"):
        for _ in range(2):
            model(IMAGE)
    for _ in range(2):
        peer(IMAGE)
    for name, value in peer.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-6, rtol=1e-5)
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    with prepared.attached("frozen_batch_norm"):
        frozen = model(IMAGE)
        assert all(torch.equal(value, before[name]) for name, value in model.named_buffers() if "running" in name)
        model.eval()
        torch.testing.assert_close(frozen, model(IMAGE), atol=0.05, rtol=0)
        model.train()
    with prepared.attached("fake_quantize"):
        model(IMAGE).sum().backward()
    assert model[0].weight.grad is not None
    assert model[1].weight.grad is not None
    assert any(not torch.equal(value, before[name]) for name, value in model.named_buffers() if "running" in name)


def test_only_training_through_rounding_needs_a_graph_in_training() -> None:
    class Branching(Plain):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and x.mean() > 0:
                return x
            return super().forward(x)

    assert ready(convolutional(Branching), IMAGE).plan.graphs[0].operators[0].norm is None
    prepared = prepare(convolutional(Branching), (IMAGE,), trains=False)
    assert prepared.plan.graphs[0].operators[0].norm is not None


@pytest.mark.parametrize("transposes", [False, True])
@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_batch_norms_of_tokens_fold_into_linear_layers(transposes: bool, runtime: str) -> None:
    torch.manual_seed(0)
    model, x = with_statistics(Tokens(transposes)), torch.randn(3, 4, 5)
    prepared = ready(model, x, runtime=runtime)
    assert not normalizations(convert(prepared))
    assert agreement(prepared, x) > 40
    model.train()
    with prepared.attached("fake_quantize"):
        assert model(x).shape == (3, 4, 6)


def test_a_norm_of_another_dimension_does_not_fold() -> None:
    class OverTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.linear(x)))

    prepared = ready(with_statistics(OverTokens()), torch.randn(3, 4, 4))
    (row,) = (row for row in prepared.plan.rows if row.name == "norm")
    assert "another dimension" in row.reason


def test_parts_that_are_rounded_alone_are_normalized_once() -> None:
    torch.manual_seed(0)
    model, x = with_statistics(Tokens()), torch.randn(3, 4, 5)
    prepared = ready(model, x)
    with torch.no_grad():
        expected = model(x)
        with prepared.attached("frozen"), prepared.simulation.quantizing_only(frozenset({":first.linear"})):
            alone = model(x)
    torch.testing.assert_close(alone, expected, atol=0.05, rtol=0)
    assert not torch.equal(alone, expected)
