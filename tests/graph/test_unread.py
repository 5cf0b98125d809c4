"""What a forward computes and does not return is no part of plan or file, and stays part of training."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant import load, runtimes
from lightning_quant.calibrate.calibrate import calibrate
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.plan import UNREAD

X = torch.randn(4, 2, 12, generator=torch.Generator().manual_seed(0))


class WaveNet(nn.Module):
    """Gated blocks: the residual of the last one goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 3, 1)
        self.filters, self.residuals, self.skips = (
            nn.ModuleList(nn.Conv1d(4, 4, size, padding=size // 2) for _ in range(2)) for size in (3, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.stem(x), torch.zeros(())
        for conv, residual, skip in zip(self.filters, self.residuals, self.skips, strict=True):
            y = F.relu(conv(x))
            total, x = total + skip(y), x + residual(y)
        return self.head(total)


class Auxiliary(nn.Module):
    """Keeps a loss on itself while it trains, so that its own code runs around its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv1d(2, 4, 3), nn.Linear(4, 3)
        self.side = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.stem(x))
        side = self.side(features)
        if self.training:
            self.loss = side.mean()
        return self.head(features.mean(2))


class SizeOnly(Auxiliary):
    """Reads of its branch no more than how large it is."""

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.stem(x))
        return self.head(features.mean(2)) + torch.zeros(self.side(features).shape[0], 3)


class Checked(Auxiliary):
    """Calls a part three times, once for nothing."""

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.stem(x))
        if self.training:
            self.loss = features.mean()
        both = self.side(features) + self.side(features.flip(2))
        self.side(both)
        return self.head(both.mean(2))


@pytest.mark.parametrize(
    ("net", "runtime"),
    [
        *((net, "onnxruntime") for net in (WaveNet, Auxiliary, SizeOnly, Checked)),
        *((net, runtime) for net in (WaveNet, Auxiliary) for runtime in ("openvino", "torch")),
    ],
)
def test_unread_results_are_left_out(net: type[nn.Module], runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net().eval()
    prepared = prepare(model, (X,), runtime=runtime, observer="min_max")
    calibrate(prepared, [lambda: model(X)])
    artifact = export(prepared, tmp_path)

    loaded, where = load(tmp_path, threads=1), runtimes.get(runtime)
    parity = prepared.parity(loaded, artifact.model_path)
    operators = tuple(operator for graph in prepared.plan.graphs for operator in graph.operators)
    assert (parity.worst_share or 0.0) >= 0.999
    assert where.still_float(operators, where.count_operators(artifact.model_path)) == {}
    unread = {row["name"].partition(".")[0] for row in artifact.plan["rows"] if row["reason"] == UNREAD}
    assert unread >= {WaveNet: {"residuals"}, Auxiliary: {"side"}, SizeOnly: {"side"}, Checked: set()}[net]
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), model(X), atol=0.1, rtol=0.1)


def test_unread_layers_go_on_learning_statistics_in_training() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            self.norm(x)
            return self.head(x)

    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 4)
    prepared = prepare(model, (x,))
    assert next(row for row in prepared.plan.rows if row.name == "norm").reason == UNREAD
    with prepared.attached("observe", observing=True):
        model(x)
    assert int(model.norm.num_batches_tracked) == 1
