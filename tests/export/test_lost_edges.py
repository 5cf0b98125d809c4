"""What was planned in integers and is not in the file is told from what nothing reads."""

from pathlib import Path

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
from prepared_graphs import evaluated
from torch import Tensor, nn

from lightning_quant.export.convert import convert
from lightning_quant.export.export import export
from lightning_quant.export.lost_edges import lost_edges
from lightning_quant.graph.plan import LOST, UNREAD
from lightning_quant.report.coverage import Coverage

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Cannot be traced itself, so that its parts are graphs; nothing reads what one of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unread = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.unread(x)
        return self.last(self.first(x))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def test_edges_whose_values_show_in_the_result_are_lost(model: nn.Module) -> None:
    prepared = evaluated(model, X)
    edges = {edge.identity for graph in prepared.plan.graphs for edge in graph.edges}
    read = {edge for edge in edges if not edge.startswith("unread")}

    assert len(read) == len(edges) - 1
    assert lost_edges(prepared, convert(prepared), edges) == set()
    assert lost_edges(prepared, convert(prepared), {"last:input"}) == read - {"last:input"}


def test_they_are_lost_too_where_other_values_raise() -> None:
    class Checked(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if float(y.abs().max()) > 3:
                raise RuntimeError("too large")
            return y

    torch.manual_seed(0)
    prepared = evaluated(Checked(), X)
    assert "first:1" in lost_edges(prepared, convert(prepared), {"first:input", "last:input"})


def test_what_a_file_has_lost_keeps_its_share_and_warns(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = evaluated(model, X)
    kind = type(prepared.runtime)
    present = kind.quantized_edges
    monkeypatch.setattr(kind, "quantized_edges", lambda self, path: present(self, path) - {"first:input", "first:1"})
    export(prepared, tmp_path / "artifact")

    rows = {row.name: row for row in prepared.plan.rows}
    assert {rows[name].reason for name in ("first.0", "first.1", "first.2")} == {LOST}
    assert rows["first.0"].macs == 6 * 4 * 8
    assert (rows["unread"].reason, rows["unread"].macs) == (UNREAD, 0)
    assert rows["last"].action == "int8"
    warnings = Coverage(prepared.plan.to_dict(), {}, {}, 1.0, None).warnings()
    assert f"3 rows of the plan (first.0, first.1, first.2): {LOST}" in warnings
