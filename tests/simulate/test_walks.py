"""A training batch stays in few files: how often it goes from one file of the package to another."""

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.export.prepare import prepare

PACKAGE = "/lightning_quant/"


class Moves:
    """Counts, as a profiler, how often calls and returns lead into another file of the package."""

    def __init__(self) -> None:
        self.number = 0
        self.files: set[str] = set()
        self._last = ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return") or PACKAGE not in frame.f_code.co_filename:
            return
        there: FrameType | None = frame if event == "call" else frame.f_back
        # What PyTorch calls in between is no file of the package.
        while there is not None and PACKAGE not in there.f_code.co_filename:
            there = there.f_back
        if there is not None and there.f_code.co_filename != self._last:
            self.number += bool(self._last)
            self._last = there.f_code.co_filename
            self.files.add(self._last)


class Net(nn.Module):
    """Three weighted operators, a BatchNorm and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head((x + self.second(x)).mean((2, 3)))


def test_a_training_batch_moves_between_few_files() -> None:
    net, x = Net(), torch.randn(4, 3, 8, 8)
    prepared = prepare(net.eval(), (x,))
    moves = Moves()
    with prepared.attached("fake_quantize", observing=True):
        net.train()
        for _ in range(3):
            net(x).sum().backward()
        sys.setprofile(moves)
        try:
            net(x).sum().backward()
        finally:
            sys.setprofile(None)

    assert len(moves.files) <= 14
    # Operators carried out one by one, as in evaluation, make 351.
    assert 50 < moves.number <= 140
