import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.calls import Call
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection
from lightning_quant.search.candidates import Candidates
from lightning_quant.search.choice import FLOAT, HALF, STORED, Choice
from lightning_quant.search.relaxations import Refined, Relaxations, names_in_integers, relaxations


class Chain(nn.Module):
    """Layers in a row, one of which answers with a few channels that are far too large and that nobody reads."""

    def __init__(self, number: int, bad: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(number))
        with torch.no_grad():
            self.layers[bad].bias[:2] = 300.0
            self.layers[bad + 1].weight[:, :2] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


def ranked(model: nn.Module, *, by_time: bool = False, **options: Any) -> Relaxations:
    calls = [Call((torch.randn(16, 16),)) for _ in range(3)]
    prepared = prepare(model, calls[0].args, trains=False, **options)
    calibrate(prepared, steps_of(prepared, calls[:2]))
    return relaxations(prepared, calls[2:], by_time=by_time)


@pytest.mark.parametrize("bad", range(4))
def test_a_planted_bad_layer_is_found_first(bad: int) -> None:
    first = dict(ranked(Chain(6, bad)).steps()[0].kept)
    # Its output is what is bad: who writes it and who reads it.
    assert first == {f"layers.{bad}": STORED, f"layers.{bad + 1}": STORED}


def test_steps_grow_and_leave_less_noise_until_one_layer_alone_is_stored() -> None:
    found = ranked(Chain(6, 2))
    steps = found.steps()
    errors = [found.error(dict(step.kept)) for step in steps]
    assert errors == sorted(errors, reverse=True)
    assert all(set(dict(a.kept)) <= set(dict(b.kept)) for a, b in itertools.pairwise(steps))
    # Nothing computes in integers any more.
    assert sorted(dict(steps[-1].kept).values()) == [HALF] * (len(found.operators) - 1) + [STORED]
    stored = Choice(tuple((name, STORED) for name in found.operators))
    assert found.at_most(found.error(dict(stored.kept))) is not None
    assert any(set(dict(step.kept)) == set(found.operators) for step in steps[:-1])
    refined = Refined(found)
    assert len(refined) == len(steps)
    for step, cheap in zip(steps, [refined[i] for i in range(len(refined))], strict=True):
        assert found.error(dict(cheap.kept)) <= found.error(dict(step.kept)) * (1 + 1e-6)
        assert found.price(dict(cheap.kept)) <= found.price(dict(step.kept))


def test_where_no_layer_can_be_stored_it_is_float() -> None:
    assert set(dict(ranked(Chain(4, 1), runtime="inductor").steps()[0].kept).values()) == {FLOAT}


def test_weights_that_float16_spares_take_half_of_the_bytes() -> None:
    ranks = ranked(Chain(4, 1))
    assert ranks.halves == set(ranks.operators)
    assert ranks.prices["layers.0", FLOAT] == 16 * 16
    last = dict(ranks.steps()[-1].kept)
    assert HALF in last.values()
    assert FLOAT not in last.values()
    assert ranked(Chain(4, 1), by_time=True).halves == frozenset()


def test_layers_that_are_stored_beside_graphs_are_ranked_and_can_be_spared() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lstm, self.head = nn.Linear(16, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(F.relu(self.first(x)))[0][:, -1])

    calls = [Call((torch.randn(8, 3, 16),)) for _ in range(3)]
    prepared = prepare(Recurrent(), calls[0].args, trains=False)
    calibrate(prepared, steps_of(prepared, calls[:2]))
    ranks = relaxations(prepared, calls[2:])
    (part,) = (part for part in ranks.parts if part.users == {"lstm"})
    assert part.error > 0
    assert "lstm" in ranks.operators
    made = Candidates(prepared, calls, Selection()).make(Choice((("lstm", FLOAT),)))
    assert not made.stored_layers()
    # Where the user says what becomes of it, that is not for a search to change.
    own = prepare(Recurrent(), calls[0].args, recipe={"name": "int8", "overrides": {"LSTM": STORED}}, trains=False)
    assert "lstm" not in names_in_integers(own)


def test_time_is_priced_by_multiply_adds() -> None:
    prices = ranked(Chain(4, 1), by_time=True).prices
    assert prices["layers.0", STORED] == prices["layers.0", FLOAT] == 16 * 16 * 16


def test_no_noise_is_lost_or_counted_twice() -> None:
    found = ranked(Chain(3, 1))
    everything = dict.fromkeys(found.operators, FLOAT)
    assert found.error(everything) == 0
    assert found.error({}) == pytest.approx(sum(part.error for part in found.parts))


def test_a_layer_that_eight_bits_leave_nothing_of_is_never_stored() -> None:
    model = Chain(4, 1)
    with torch.no_grad():
        # What reads a feature that is always zero takes all of the integers.
        model.layers[0].weight[:, 0] = 1e5
    x = torch.randn(3, 16, 16)
    x[..., 0] = 0.0
    calls = [Call((batch,)) for batch in x]
    prepared = prepare(model, calls[0].args, trains=False)
    calibrate(prepared, steps_of(prepared, calls[:2]))
    stored = {name for name, scheme in relaxations(prepared, calls[2:]).prices if scheme == STORED}
    assert stored == {"layers.1", "layers.2", "layers.3"}
