"""Names inside a recipe are looked up when it is written."""

import pytest

from lightning_quant.errors import QuantizationError
from lightning_quant.recipe.recipe import IntegerSpec, Recipe, get
from lightning_quant.runtimes import check_recipe


@pytest.mark.parametrize("bits", [9, 12, 15])
def test_activations_that_no_runtime_runs_are_refused_when_written(bits: int) -> None:
    with pytest.raises(QuantizationError, match=rf"to be a grid .* 2 to 8 or 16 bits, .* \[0, {2**bits - 1}\]"):
        get({"activation": {"bits": bits}})
    with pytest.raises(QuantizationError, match=rf"'own' .* that runtime 'torch' runs .*{2**bits - 1}"):
        check_recipe("torch", Recipe(name="own", activation=IntegerSpec(bits=bits)))
