"""Graphs are believed only where they do what their forward does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_proxy import Around, Asking, X, float_graph_of
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.convert import convert
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise


def matched(y: Any) -> Tensor:
    match y:
        case Tensor():
            return y
        case _:
            return y * 2


def history(y: Any) -> Tensor:
    return y if y.grad_fn is None else y * 1.0


def tried_flat_view(y: Any) -> Tensor:
    try:
        flat = y.t().view(-1)
    except RuntimeError:
        flat = y.t().reshape(-1)
    return flat.reshape(8, 4).t()


def undecided() -> list[Callable[[Any], Tensor]]:
    return [matched, history, tried_flat_view]


@pytest.mark.parametrize("ask", undecided(), ids=lambda ask: ask.__name__)
def test_where_no_trace_can_tell_the_module_runs_as_it_is(ask: Callable[[Any], Tensor]) -> None:
    rows = float_graph_of(Around(Asking(ask)))

    assert {rows[name] for name in ("inner.first", "inner.last", "head")} == {"int8"}


def test_a_part_whose_graph_fails_is_left_as_it_is_and_the_plan_says_why() -> None:
    prepared = prepare(Around(Asking(tried_flat_view)), (X,))
    reasons = {row.name: row.reason for row in prepared.plan.rows}

    assert "its graph fails where it does not (RuntimeError: view size" in reasons["inner"]


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()


def answers(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: 2 * output)


def is_given(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("hook", [answers, is_given], ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("place", ["2", "3", ""])
def test_what_a_hook_changes_stays_as_it_is(place: str, hook: Callable[[nn.Module], None], trains: bool) -> None:
    model, x = chain(), torch.randn(64, 8)
    hook(model.get_submodule(place))
    prepared = prepare(model, (x,), trains=trains)
    calibrate(prepared, steps_of(prepared, [x]))
    (row,) = [row for row in prepared.plan.rows if row.name == (place or "(forward)")]
    in_integers = {row.name.partition(".")[0] for row in prepared.plan.rows if row.action == "int8"}

    assert row.action == "float"
    assert "a hook on it changes" in row.reason
    assert in_integers == {"0", "2", "4"} - {place}
    with torch.no_grad():
        assert signal_to_noise(model(x), convert(prepared)(x)) > 30


class Shifted(nn.Linear):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return super().forward(x) + shift


def test_a_layer_that_gets_an_argument_from_its_hook_stays_as_it_is() -> None:
    model, x = chain(), torch.randn(16, 8)
    model[2] = Shifted(8, 8)
    model[2].register_forward_pre_hook(lambda module, args: (args[0], torch.ones(8)))
    rows = {row.name: row for row in prepare(model, (x,), trains=False).plan.rows}
    assert "a hook on it changes" in rows["2"].reason
    assert rows["0"].action == rows["4"].action == "int8"


@pytest.mark.parametrize("watch", ["watcher", "prune", "weight_norm", "parametrization"])
def test_hooks_that_watch_or_make_weights_leave_a_layer_in_integers(watch: str) -> None:
    model, x = chain(), torch.randn(64, 8)
    if watch == "watcher":
        model[2].register_forward_hook(lambda *_: None)
    elif watch == "prune":
        prune.l1_unstructured(model[2], "weight", 0.3)
    elif watch == "weight_norm":
        nn.utils.parametrizations.weight_norm(model[2])
    else:
        parametrize.register_parametrization(model[2], "weight", nn.Tanh())
    assert {row.name for row in prepare(model, (x,)).plan.rows if row.action == "int8"} == {"0", "2", "4"}
