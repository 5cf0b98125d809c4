"""Recurrences and bags of classes that users derive, which do more around PyTorch's forward."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from stored_layers import WEIGHT_ONLY, check, quantized
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.numerics.noise import signal_to_noise

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


class NormedLSTM(nn.LSTM):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, batch_first=True, bidirectional=True)
        self.reads, self.norm = nn.Linear(sizes[0], sizes[0]), nn.LayerNorm(2 * sizes[1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (hidden, _) = super().forward(self.reads(x))
        return self.norm(y) + self.weight_hh_l0.sum(), hidden[-1]


class DroppedLSTM(nn.LSTM):
    """Sets a weight from a parameter of another name at each call, as weight drop does."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, batch_first=True)
        self.register_parameter("weight_hh_l0_raw", nn.Parameter(self.weight_hh_l0.detach().clone()))
        del self._parameters["weight_hh_l0"]
        self.weight_hh_l0 = self.weight_hh_l0_raw.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        self.weight_hh_l0 = nn.functional.dropout(self.weight_hh_l0_raw, 0.5, self.training).clone()
        return super().forward(x)[0]


class PackedGRU(nn.GRU):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(super().forward(packed)[0])[0]


class ScaledBag(nn.EmbeddingBag):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embedding_dim**0.5


class NormedCell(nn.GRUCell):
    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return super().forward(x, state).tanh()


CASES: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
    (NormedLSTM(16, 8), (torch.randn(3, 5, 16),)),
    (DroppedLSTM(16, 8), (torch.randn(3, 5, 16),)),
    (PackedGRU(16, 8), (torch.randn(5, 3, 16), torch.tensor([5, 2, 4]))),
    (ScaledBag(40, 16, mode="sum"), (torch.randint(40, (3, 7)),)),
    (NormedCell(16, 8), (torch.randn(3, 16), torch.randn(3, 8))),
]


@pytest.mark.parametrize(("layer", "args"), CASES, ids=lambda case: type(case).__name__)
def test_the_forward_of_a_subclass_runs_around_stored_weights(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    check(layer.eval(), *args, scheme=WEIGHT_ONLY)


def test_copies_and_pickles_of_such_layers_compute_the_same() -> None:
    model, x = nn.Sequential(NormedLSTM(16, 8)).eval(), torch.randn(3, 5, 16)
    stored = quantized(model, x).quantized()
    with torch.no_grad():
        expected = stored(x)
        for other in (copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
            torch.testing.assert_close(other(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch"])
def test_graphs_store_them_small(runtime: Any, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.reads = ScaledBag(2000, 32, mode="mean"), NormedLSTM(32, 64)
            self.head = nn.Linear(32 + 64, 5)

        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.table(ids), self.reads(x)[1]], 1))

    model = Net().eval()
    args = torch.randint(2000, (4, 7)), torch.randn(4, 6, 32)
    artifact = lq.quantize(model, "int8", runtime, calibration_data=[args], output_dir=tmp_path)
    assert artifact.report is not None
    assert artifact.report["size_ratio"] < 0.6
    assert {row["name"]: row["action"] for row in artifact.report["plan"]["rows"]}["reads"] == "int8 weights"
    with torch.no_grad():
        assert signal_to_noise(model(*args), lq.load(artifact)(*args)) > 25
