"""Graphs are believed only where they do what their forward does."""

from collections.abc import Callable
from typing import Any

import pytest
from test_proxy import Around, Asking, X, float_graph_of
from torch import Tensor

from lightning_quant.export.prepare import prepare


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
