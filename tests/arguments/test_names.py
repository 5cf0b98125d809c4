"""Types of arguments name what there is."""

from typing import get_args, get_type_hints

import lightning_quant as lq
from lightning_quant import runtimes
from lightning_quant.arguments import names
from lightning_quant.ranges import observers
from lightning_quant.recipe import recipe
from lightning_quant.runtimes import _torch_static

BOTH = (lq.QuantizationAwareTraining, lq.PostTrainingQuantization)


def test_types_name_what_there_is() -> None:
    assert set(get_args(names.RecipeName)) == set(recipe.RECIPES)
    assert set(get_args(names.RuntimeName)) == {"auto", *runtimes.names()}
    assert set(get_args(names.ObserverName)) == set(observers.OBSERVERS)
    assert {"auto", "fastest", *_torch_static.engines()} <= set(get_args(names.EngineName))
    for door in (lq.quantize, *(kind.__init__ for kind in BOTH)):
        hints = get_type_hints(door)
        assert names.RuntimeName in get_args(hints["runtime"])
        assert names.RecipeName in get_args(hints["recipe"])
        assert names.EngineName in get_args(hints["engine"])
