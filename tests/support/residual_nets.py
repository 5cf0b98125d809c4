"""A residual net and a batch of images for it."""

from typing import Any

import torch
from models import ResidualNet, with_statistics

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.export.prepare import prepare
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.simulate.prepared import Prepared

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


# Biases that follow the present weights alone, as in training.
UNCORRECTED = Recipe(name="uncorrected", bias_correction=False)


def residual_net() -> tuple[ResidualNet, Prepared]:
    model = with_statistics(ResidualNet()).eval()
    prepared = prepare(model, (IMAGE,), observer="min_max", recipe=UNCORRECTED)
    calibrate(prepared, steps_of(prepared, [IMAGE, 2 * IMAGE]))
    return model, prepared


def equal(left: Any, right: Any) -> bool:
    pairs = list(zip(tensor_leaves(left), tensor_leaves(right), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def residual() -> tuple[ResidualNet, Prepared]:
    torch.manual_seed(0)
    model = with_statistics(ResidualNet()).train()
    prepared = prepare(model, (IMAGE,))
    prepared.attach()
    prepared.observing = True
    return model, prepared
