"""What cannot be traced is split into graphs of what can."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import BranchingNet, ViewsNet, with_statistics
from prepared_graphs import ready, recorded_edges, rows_of
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from lightning_quant.errors import PlanError
from lightning_quant.export.convert import convert
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_children_of_an_untraceable_forward_become_graphs() -> None:
    prepared = prepare(with_statistics(BranchingNet()).eval(), (IMAGE,))
    assert sorted(prepared.islands) == ["backbone", "head"]
    row = prepared.plan.rows[0]
    assert (row.name, row.kind, row.action) == ("(forward)", "BranchingNet", "float")
    assert "cannot be traced" in row.reason
    assert prepared.plan.coverage == 1.0
    assert {edge.partition(":")[0] for edge in recorded_edges(ready(prepared.root, IMAGE), IMAGE)} == {
        "backbone",
        "head",
    }


def test_an_untraceable_forward_still_takes_both_of_its_branches() -> None:
    """The pair of the test above: with one branch baked in, the other input would give a wrong result."""
    model = with_statistics(BranchingNet()).eval()
    prepared = ready(model, IMAGE)
    huge = IMAGE * 1e8
    with torch.no_grad():
        expected = model(huge)
        with prepared.attached("observe"):
            torch.testing.assert_close(model(huge), expected, atol=0, rtol=0)
    assert expected.abs().max() < 1e4


def test_an_island_is_called_as_often_as_its_forward_says() -> None:
    model = with_statistics(ViewsNet()).eval()
    views = torch.randn(4, 2, 3, 6, 6)
    prepared = ready(model, views)
    assert sorted(prepared.islands) == ["encoder", "head"]
    edges = recorded_edges(prepared, views)
    assert edges.count("encoder:0") + edges.count("encoder:1") + edges.count("encoder:2") == 2
    assert len([edge for edge in edges if edge.startswith("head:")]) == 1


def test_a_leaf_layer_is_the_smallest_island() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.fc1(x)
            return self.fc2(hidden if hidden.sum() > 0 else -hidden)

    model, x = Net().eval(), torch.randn(16, 4)
    prepared = ready(model, x)
    assert sorted(prepared.islands) == ["fc1", "fc2"]
    with torch.no_grad():
        expected = model(x)
        assert 20 < signal_to_noise(expected, convert(prepared)(x)) < 80


class Branching(nn.Module):
    """A block inside a traceable net that branches on a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > -1e9 else x


def test_an_untraceable_block_does_not_split_its_surroundings() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), Branching(), nn.ReLU(), nn.Conv2d(6, 2, 3)).eval()
    prepared = ready(model, IMAGE)
    assert sorted(prepared.islands) == ["", "2.conv"]
    assert [row.action for row in prepared.plan.rows if row.macs] == ["int8"] * 3
    (row,) = [row for row in prepared.plan.rows if row.name == "2"]
    assert row.action == "float"
    assert "control flow" in row.reason
    with torch.no_grad():
        assert 20 < signal_to_noise(model(IMAGE), convert(prepared)(IMAGE)) < 80


def test_a_forward_without_traceable_layers_raises_with_the_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight if x.sum() > 0 else x

    with pytest.raises(PlanError, match=r"nothing.*cannot be traced"):
        prepare(Net(), (torch.randn(2, 4),))


class Own(nn.Module):
    """A layer of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix * 0.5)


class Derived(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Around(nn.Module):
    """Runs a layer whole, or so that nothing around it can be traced."""

    def __init__(self, layer: nn.Module, *, opaque: bool) -> None:
        super().__init__()
        self.first, self.layer, self.opaque = nn.Linear(4, 4), layer, opaque

    def forward(self, x: Tensor) -> Tensor:
        if self.opaque and x.sum() > 100:
            return x
        return self.layer(torch.relu(self.first(x)))


@pytest.mark.parametrize("opaque", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 4),
        lambda: Derived(4, 4),
        Own,
        lambda: weight_norm(nn.Linear(4, 4)),
        lambda: Conv1D(4, 4),
        lambda: torch.nn.utils.spectral_norm(nn.Linear(4, 4)),
    ],
    ids=["linear", "derived", "own", "weight_norm", "conv1d", "hooked"],
)
def test_a_layer_goes_by_its_path_wherever_it_is(make: Callable[[], nn.Module], opaque: bool) -> None:
    model, x = Around(make(), opaque=opaque), torch.randn(3, 4)

    assert {name for name, row in rows_of(model, x).items() if row.action == "int8"} == {"first", "layer"}
    excluded = rows_of(model, x, exclude=("layer",))["layer"]
    assert (excluded.action, excluded.reason) == ("float", 'excluded by "layer"')
