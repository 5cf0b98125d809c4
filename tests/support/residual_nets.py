"""A residual net, and what tests make of it."""

from typing import Any

import torch
from models import ResidualNet, with_statistics
from prepared_graphs import evaluated
from torch import nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.export.prepare import prepare
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.simulate.prepared import Prepared

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LARGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
# Biases that follow the present weights alone, as in training.
UNCORRECTED = Recipe(name="uncorrected", bias_correction=False)


def residual() -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(ResidualNet()).eval()


def residual_on(runtime: str) -> Prepared:
    """Return the net calibrated for a runtime."""
    return evaluated(residual(), IMAGE, runtime=runtime)


def residual_net() -> tuple[ResidualNet, Prepared]:
    """Return the net, and it calibrated on two calls without corrections of biases."""
    model = with_statistics(ResidualNet()).eval()
    prepared = prepare(model, (IMAGE,), observer="min_max", recipe=UNCORRECTED)
    calibrate(prepared, steps_of(prepared, [IMAGE, 2 * IMAGE]))
    return model, prepared


def observing_residual() -> tuple[ResidualNet, Prepared]:
    """Return the net as it trains: routed to its graphs, which observe."""
    torch.manual_seed(0)
    model = with_statistics(ResidualNet()).train()
    prepared = prepare(model, (LARGE,))
    prepared.attach()
    prepared.observing = True
    return model, prepared


def equal(left: Any, right: Any) -> bool:
    pairs = list(zip(tensor_leaves(left), tensor_leaves(right), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)
