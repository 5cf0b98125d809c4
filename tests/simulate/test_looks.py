"""What looks at a simulation leaves it as it was."""

import pytest
import torch
from torch import nn

from lightning_quant.simulate.looks import Looks


def test_every_look_ends_with_its_block() -> None:
    looks = Looks()
    before = dict(vars(looks))
    opened = looks.recording(), looks.keeping_weights(), looks.watching(print), looks.jittering(), looks.measuring(None)
    for block in (*opened, looks.quantizing_only(frozenset({"a"}))):
        with pytest.raises(ZeroDivisionError), block:
            raise ZeroDivisionError
    assert {**vars(looks), "_together": None} == before


class Clipped(nn.Module):
    """Convolutions with clips, a sum, a pool, and a term that float code reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)
        self.clip, self.relu = nn.ReLU6(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.clip(self.one(x))
        y = self.relu(self.two(x) + x)
        return self.last(y.mean((2, 3)) + torch.erf(x).amax((2, 3)))


def test_integers_that_go_with_values_are_those_that_would_be_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_quant.export.prepare import prepare
    from lightning_quant.simulate.simulation import Simulation

    torch.manual_seed(0)
    net, x = Clipped().eval(), torch.randn(4, 3, 8, 8)
    prepared = prepare(net, (x,), observer="min_max")
    with torch.no_grad(), prepared.attached("observe", observing=True):
        net(x)
    answers, computed = [], []
    divide = Simulation._integers_of

    def counting(simulation: Simulation, identity: str, x: torch.Tensor) -> torch.Tensor:
        carried = x.__dict__.get("lightning_quant_integers")
        computed.append(carried is None)
        return divide(simulation, identity, x)

    monkeypatch.setattr(Simulation, "_integers_of", counting)
    with torch.no_grad(), prepared.attached("frozen"):
        for carries in (True, False):
            if not carries:
                monkeypatch.setattr(Simulation, "_carries", lambda *_: False)
            with prepared.simulation.recording() as edges, prepared.simulation.keeping_weights():
                answers.append([net(x), net(x), *(integers for _, integers in edges)])
    half = len(computed) // 2
    assert not any(computed[:half])
    assert all(computed[half:])
    assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))
