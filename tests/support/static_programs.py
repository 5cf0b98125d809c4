"""Nets calibrated for static programs of the runtime `torch`."""

from prepared_graphs import evaluated
from residual_nets import IMAGE
from torch import Tensor, nn

from lightning_quant.recipe.recipe import Recipe
from lightning_quant.simulate.prepared import Prepared


def ready(model: nn.Module, x: Tensor = IMAGE, recipe: str | Recipe = "int8") -> Prepared:
    return evaluated(model, x, recipe=recipe, runtime="torch")
