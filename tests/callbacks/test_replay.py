import pytest
import torch
from torch import Tensor, nn

from lightning_quant.callbacks import replay
from lightning_quant.callbacks.replay import recorded_steps, replayed


class Writing(nn.Module):
    """Writes into what it reads, and notes it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(float(x.sum()))
        return x.add_(1)


def test_steps_are_replayed_with_the_calls_that_they_made_as_often_as_wanted() -> None:
    outer = nn.Sequential(Writing())
    root = outer[0]
    steps = [lambda: [root(torch.zeros(2)), root(torch.ones(2))], lambda: [root(torch.full((2,), 2.0))]]
    recorded = recorded_steps(root, steps, 2)
    assert recorded is not None
    assert [len(calls) for calls in recorded] == [2, 1]
    for _ in range(2):
        root.seen.clear()
        number = 0
        for step in replayed(outer, root, recorded, 0):
            step()
            number += 1
        assert number == 2
        assert root.seen == [0.0, 2.0, 4.0]


def test_calls_that_take_too_much_memory_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "RECORDED_BYTES", 100)
    root, ran = Writing(), []
    steps = [lambda: ran.append(root(torch.zeros(10)))] * 3
    assert recorded_steps(root, steps, 3) is None
    assert len(ran) == 1
    assert recorded_steps(root, steps, 2) is not None
