"""How far rounding ties alone bring a model from itself."""

import math

import pytest
import torch
from prepared_graphs import evaluated
from torch import nn

from lightning_quant.simulate.ties import NUM_DRAWS, farthest, off_ties, tipped_ties


def test_values_on_a_tie_move_off_it_towards_zero_and_no_others() -> None:
    prepared = evaluated(nn.Sequential(nn.Linear(4, 2)), torch.tensor([[-1.0, 1.55, 0.3, 0.0]]))
    scale, _ = prepared.ranges.parameters(":input")
    x = torch.tensor([[0.5, -2.5, 1.2, 3.0]]) * scale
    (moved,) = off_ties(prepared, [x])

    assert bool((torch.round(moved[0, :2] / scale) == torch.tensor([0.0, -2.0])).all())
    assert bool(((moved - x).abs()[0, :2] / scale - 0.01 < 1e-5).all())
    assert torch.equal(moved[0, 2:], x[0, 2:])


def test_draws_are_as_far_from_the_simulation_as_its_ties_can_bring_it_and_repeat() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU())))
    prepared = evaluated(model, x)
    with torch.no_grad(), prepared.attached("frozen"):
        simulated = model(x)
    state = torch.get_rng_state()
    draws, _ = tipped_ties(prepared, (x,), {}, simulated)

    assert len(draws) == NUM_DRAWS
    assert draws == tipped_ties(prepared, (x,), {}, simulated)[0]
    assert min(draws) > 20
    assert torch.equal(torch.get_rng_state(), state)


def test_one_more_draw_is_hardly_ever_farther() -> None:
    assert farthest((math.inf,) * NUM_DRAWS) == math.inf
    assert farthest((40.0,) * NUM_DRAWS) == pytest.approx(40.0)
    assert farthest((30.0, 40.0) * (NUM_DRAWS // 2)) < 28


class _Ranked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = self.score(x).relu().flatten(1).topk(5).indices
        return order, x.gather(1, order[..., None].expand(-1, -1, 4))


def test_equal_scores_are_put_in_another_order() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 400, 4)
    model = _Ranked()
    model.score.bias.data.fill_(-9.0)  # All scores are zero behind the ReLU.
    prepared = evaluated(model, x)
    with torch.no_grad(), prepared.attached("frozen"):
        simulated = model(x)
    decibels, shares = tipped_ties(prepared, (x,), {}, simulated)

    assert max(decibels) < 3
    assert min(shares) > 0.5
