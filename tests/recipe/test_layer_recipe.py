"""What a recipe of layers takes."""

import pytest

from lightning_quant.errors import QuantizationError
from lightning_quant.recipe.layer_recipe import LayerRecipe


@pytest.mark.parametrize(("field", "value"), [("min_stored_share", 2.0), ("group_size", 0), ("gptq", 1)])
def test_wrong_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(QuantizationError, match=f"Expected `{field}` to be"):
        LayerRecipe("own", ("weight_only",), **{field: value})  # type: ignore[arg-type]


def test_the_way_out_of_noise_is_that_of_its_bits() -> None:
    assert "int8_weight_only" in LayerRecipe("own", ("weight_only_4bit",)).against_noise
    assert "int8_weight_only" in LayerRecipe("own", ("dynamic",)).against_noise
    alone = LayerRecipe("own", ("weight_only",)).against_noise
    assert "exclude" in alone
    assert "int8_weight_only" not in alone
