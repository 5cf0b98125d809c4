"""OpenVINO computes what reads a reduction in its kernel, and often wrongly."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.artifact import artifact as artifacts
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise

REDUCTIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "mean over tokens": (12, lambda x: x.mean(1)),
    "sum over tokens, kept": (12, lambda x: x.sum(1, keepdim=True).squeeze(1) / 16),
    "mean over features": (16, lambda x: x.mean(2)),
    "maximum over tokens": (12, lambda x: x.amax(1)),
    "minimum over tokens, kept": (12, lambda x: x.relu().amin(1, keepdim=True).squeeze(1)),
    "norm over tokens": (12, lambda x: x.norm(dim=1)),
    "mean over one of four": (12, lambda x: x.unflatten(1, (4, 4)).mean(1).amax(1)),
    "mean of a maximum": (12, lambda x: x.unflatten(1, (4, 4)).amax(2).mean(1)),
    "maximum over places": (12, lambda x: x.transpose(1, 2).unflatten(2, (4, 4)).amax((2, 3))),
}


class Pooled(nn.Module):
    """A sum of two layers, reduced, normalized and classified."""

    def __init__(self, size: int, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.reduce, self.first, self.second = reduce, nn.Linear(6, 12), nn.Linear(6, 12)
        self.norm, self.head = nn.BatchNorm1d(size), nn.Linear(size, 5)
        self.norm.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
        self.norm.running_var.uniform_(0.02, 0.1)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.reduce(self.first(x) + self.second(x))))


class Reduced(nn.Module):
    """A function as a layer."""

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(x)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction_is_what_was_simulated(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Pooled(*REDUCTIONS[name]).eval(), torch.randn(4, 16, 6)
    prepared = prepare(model, (x,), runtime="openvino")
    calibrate(prepared, steps_of(prepared, [x]))
    artifact = export(prepared, tmp_path)
    loaded = artifacts.load(artifact.path, threads=1)

    assert prepared.parity(loaded, artifact.model_path).failures == []
    with torch.no_grad():
        assert signal_to_noise([model(x)], [loaded(x)]) > 25


@pytest.mark.parametrize("reduce", [lambda x: x.amax(2), lambda x: x.max(2).values], ids=["amax", "max"])
def test_maximum_over_places(reduce: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    places = nn.Sequential(nn.Conv1d(3, 16, 1), nn.ReLU(), nn.Conv1d(16, 32, 1), nn.ReLU())
    model = nn.Sequential(places, Reduced(reduce), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(4, 3, 24)
    prepared = prepare(model, (x,), runtime="openvino")
    calibrate(prepared, steps_of(prepared, [x]))
    artifact = export(prepared, tmp_path)

    assert artifact.signature.inputs[0].shape == ("batch", 3, 24)
    assert prepared.parity(artifacts.load(artifact.path, threads=1), artifact.model_path).failures == []


class CrossAttention(nn.Module):
    """Learned queries attend to what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.queries = nn.Linear(8, 32), nn.Parameter(torch.randn(5, 32))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.read(x)
        return self.attention(self.queries.expand(len(x), -1, -1), memory, memory, need_weights=False)[0]


def test_attention_answers_the_same_in_every_call(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = CrossAttention().eval(), torch.randn(8, 12, 8)
    prepared = prepare(model, (x,), runtime="openvino")
    calibrate(prepared, steps_of(prepared, [x]))
    loaded = artifacts.load(export(prepared, tmp_path, dynamic_shapes="static").path, threads=1)

    with torch.no_grad():
        answers = [loaded(x) for _ in range(3)]
        assert all(signal_to_noise([model(x)], [answer]) > 30 for answer in answers)


class Best(nn.Module):
    """Gathers at the best scores from a part of what it computed, as the end of a detector does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).flatten(2)
        best = y[:, 4].topk(3, dim=1).indices
        return torch.gather(y[:, :4], 2, best[:, None].expand(-1, 4, -1))


def test_a_part_that_is_gathered_from_stays_a_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared = prepare(Best().eval(), (torch.randn(4, 3, 8, 8),), runtime="openvino")
    calibrate(prepared, steps_of(prepared, [torch.randn(4, 3, 8, 8)]))
    artifact = export(prepared, tmp_path)

    assert artifacts.load(artifact.path, threads=1)(torch.randn(4, 3, 8, 8)).shape == (4, 4, 3)
