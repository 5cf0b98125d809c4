"""What a node does is known in every spelling, and has a row."""

import collections

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import CASES, Case, calibrated
from prepared_graphs import rows_of
from torch import Tensor, nn

from lightning_quant.graph import operations

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_tell_what_happens_to_every_layer(case: Case) -> None:
    _, prepared = calibrated(case, batches=1)
    rows = prepared.plan.rows
    names = [row.name for row in rows]
    assert len(names) == len(set(names))
    for path, module in prepared.root.named_modules():
        if operations._MODULES.get(type(module)) in operations.LISTED:
            assert any(name == path or name.startswith(f"{path}.") for name in names), path
    for row in rows:
        assert row.action in ("int8", "int8 weights", "fused", "float")
        assert row.is_quantized or row.reason, row
        if row.action == "fused":
            assert row.reason.removeprefix("into ") in names
    integer = {row.name for row in rows if row.action == "int8" and not row.reason}
    assert {operator.name for operator in prepared.operators.values()} == integer


class Everything(nn.Module):
    """One of each operator that a plan must list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.conv3d = nn.Conv3d(1, 1, (1, 3, 3), padding=(0, 1, 1))
        self.norm, self.group_norm = nn.LayerNorm(8), nn.GroupNorm(2, 8)
        self.gelu, self.tanh = nn.GELU(), nn.Tanh()
        self.embedding = nn.Embedding(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.project = nn.Linear(8, 8)
        self.max_pool, self.adaptive = nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(4)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        x = self.group_norm(self.up(F.relu(self.conv(image))))
        x = self.adaptive(self.max_pool(self.conv3d(x.unsqueeze(1)).squeeze(1) - 0.5))
        sequence = self.norm(x.flatten(2).transpose(1, 2)) + self.embedding(tokens)
        sequence, _ = self.attention(sequence, sequence, sequence)
        sequence, _ = self.lstm(self.gelu(sequence))
        scores = torch.softmax(torch.matmul(sequence, sequence.transpose(1, 2)), -1)
        return self.project(self.bilinear(torch.bmm(scores, sequence), self.tanh(sequence)))


def test_every_listed_operator_has_a_row_and_a_reason() -> None:
    rows = rows_of(Everything(), IMAGE, torch.randint(5, (4, 16)))
    kinds = collections.Counter(row.kind for row in rows.values())
    for kind in (
        *("Conv2d", "ConvTranspose2d", "Conv3d", "GroupNorm", "LayerNorm", "MaxPool2d", "AdaptiveMaxPool2d", "GELU"),
        *("Embedding", "LSTM", "Bilinear", "Linear", "Tanh", "bmm", "sub"),
    ):
        assert kinds[kind] == 1, kind
    assert kinds["add"] == 1
    assert kinds["MultiheadAttention"] == kinds["softmax"] == 2
    assert all(row.reason for row in rows.values() if row.action == "float")
    expected = {"conv", "conv3d", "project", "attention", "attention.out_proj"}
    assert {row.name for row in rows.values() if row.action == "int8"} == expected
    assert {row.name for row in rows.values() if row.action == "int8 weights"} == {"embedding", "lstm", "up"}


def test_every_kind_has_a_row_but_those_that_move_values_or_leave_them() -> None:
    tables = (operations._MODULES, operations._FUNCTIONS, operations._METHODS)
    kinds = {kind for table in tables for kind in table.values()}
    assert kinds - operations.LISTED <= operations.MOVING | {"pad", "pass", "split"}
    assert operations.LISTED >= operations.WEIGHTED | operations.ACTIVATIONS | operations.STORED
