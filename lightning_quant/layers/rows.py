"""A row of the plan for every layer, and for what a call computes beside them."""

from dataclasses import replace
from typing import Any

from torch import nn

from lightning_quant.graph.claims import Claim, settle
from lightning_quant.graph.counting import observe_call
from lightning_quant.graph.plan import Row, join
from lightning_quant.layers.products import MIN_VALUES
from lightning_quant.layers.trial import Trial
from lightning_quant.surgery.routing import evaluation_mode


def rows_of(model: nn.Module, tried: list[Trial], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Row, ...]:
    """Return a row for every layer, and for what the call computes beside them."""
    claims = []
    counted: set[int] = set()
    for trial in tried:
        weights = [weight for weight in trial.weights if weight.data_ptr() not in counted]
        counted.update(weight.data_ptr() for weight in weights)
        action = "float" if trial.layer is None else trial.layer.scheme.action
        row = Row(trial.label, trial.kind, action, trial.reason, excluded=trial.excluded)
        row = replace(row, weights=sum(weight.numel() for weight in weights))
        claims.append(Claim(row, trial.place, "whole", apart=trial.apart))
        for name, weight in trial.others:
            why = f"it has fewer than {MIN_VALUES} values" if weight.numel() < MIN_VALUES else "no product reads it"
            row = Row(join(trial.place, name), "Parameter", "float", why, weights=weight.numel())
            claims.append(Claim(row, row.name, "layer"))
    with evaluation_mode(model):
        return tuple(settle(claims, observe_call(model, args, kwargs)))
