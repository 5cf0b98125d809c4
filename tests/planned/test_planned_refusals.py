"""Which recipes of layers a runtime runs, and who runs the others."""

import pytest

from lightning_quant import runtimes
from lightning_quant.errors import PlanError
from lightning_quant.planned.refusals import check_runs
from lightning_quant.recipe.recipe import LayerRecipe


def test_a_runtime_that_runs_layers_says_how_it_computes_in_half_precision() -> None:
    assert check_runs("torch", LayerRecipe("one", ("float16",)))
    assert not check_runs("onnxruntime", LayerRecipe("one", ("float16",)))


def test_the_way_out_names_the_runtimes_that_have_it() -> None:
    with pytest.raises(
        PlanError, match=r"layers for 'one', but 'inductor' does not\. Use runtime .*'torch'"
    ) as refusal:
        check_runs("inductor", LayerRecipe("one", ("weight_only",)))
    assert "'inductor'," not in str(refusal.value).partition("Use runtime")[2]
    refused = next(iter(runtimes.get("openvino").LAYER_REFUSALS))
    with pytest.raises(PlanError, match=r"that 'openvino' runs, but got 'one': \w"):
        check_runs("openvino", LayerRecipe("one", (refused,)))
