"""Which graph serves a call: one for each structure and each set of flags, made once."""

import pytest
import torch
from prepared_graphs import evaluated
from torch import Tensor, nn

from lightning_quant.simulate import running


class Scaled(nn.Module):
    """Takes a tensor by position or keyword, a constant, and has a part with a flag of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor, factor: float = 1.0, other: Tensor | None = None) -> Tensor:
        y = self.dropout(self.layer(x)) * factor
        return y if other is None else y + other


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that were made."""
    paths: list[str] = []
    original = running.instrument

    def noting(module: nn.Module, island: object, *args: object) -> object:
        paths.append(str(module.training))
        return original(module, island, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "instrument", noting)
    return paths


def test_a_graph_is_made_once_for_each_structure_and_set_of_flags(made: list[str]) -> None:
    model, x = Scaled().eval(), torch.randn(3, 4)
    prepared = evaluated(model, x)
    made.clear()
    with torch.no_grad(), prepared.attached("off"):
        for call in ({"x": x}, {"x": torch.randn(5, 4)}, {"x": x, "factor": 2.0}, {"x": x, "other": x}):
            for _ in range(2):
                expected = Scaled.forward(model, **call)
                assert torch.equal(model(**call), expected)
        assert len(made) <= 3
        before = len(made)
        model.dropout.train()
        model(x)
        model(x)
        assert len(made) == before + 1


def test_sizes_of_calls_are_noted_and_the_captured_ones_are_not(made: list[str]) -> None:
    model, x = Scaled().eval(), torch.randn(3, 4)
    prepared = evaluated(model, x)
    with torch.no_grad(), prepared.attached("off"):
        model(x)
        assert prepared.varying == set()
        model(torch.randn(7, 4))
    assert prepared.varying == {("x", 0)}
