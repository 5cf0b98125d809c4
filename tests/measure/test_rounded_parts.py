"""What is rounded for the sake of which operator."""

import torch
from prepared_graphs import evaluated
from torch import Tensor, nn

from lightning_quant.measure.rounded_parts import all_but, name_of, own_parts, read_from_float, touched_edges


class Shared(nn.Module):
    """Two layers read one tensor; a pool passes on what the first of them writes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.pool, self.last = nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.last(self.pool(self.one(x))), self.two(x)


def test_tensors_stay_rounded_as_long_as_an_operator_reads_or_writes_them() -> None:
    prepared = evaluated(Shared(), torch.randn(2, 3, 4, 4))

    assert name_of(prepared, ":one") == "one"
    assert own_parts(prepared, ":one") == ({":one"}, {":x", ":one"})
    assert read_from_float(prepared, ":last") == set()
    assert touched_edges(prepared, ":two") == {":x", ":two"}

    everything = all_but(prepared)
    assert everything >= {":x", ":one", ":pool", ":two", ":last"}
    assert everything - all_but(prepared, ["two"]) == {":two"}
    # The input of both goes only when both are float, and what a pool passes on with what it reads.
    assert ":x" not in all_but(prepared, ["one", "two"])
    assert all_but(prepared, ["one", "two", "last"]) == frozenset()
