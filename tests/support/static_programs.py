"""Nets for programs of the runtime `torch`, prepared and calibrated."""

import torch
from models import ResidualNet, with_statistics
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.prepare import prepare
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.simulate.prepared import Prepared

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def ready(model: nn.Module, x: Tensor = IMAGE, recipe: str | Recipe = "int8") -> Prepared:
    prepared = prepare(model, (x,), recipe=recipe, runtime="torch", observer="min_max")
    calibrate(prepared, steps_of(prepared, [x]))
    return prepared


def residual() -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(ResidualNet()).eval()
