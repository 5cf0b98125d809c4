from dataclasses import FrozenInstanceError

import pytest
from layer_models import LAYER_RECIPES

from lightning_quant.errors import QuantizationError
from lightning_quant.layers.storage import SCHEMES
from lightning_quant.recipe import RECIPES, IntegerSpec, LayerRecipe, Recipe, get


def test_named_recipes() -> None:
    assert all(get(name) is recipe and recipe.name == name for name, recipe in RECIPES.items())
    by_gptq = ["int4_weight_only_gptq", "int8_weight_only_gptq"]
    others = ["bfloat16", "float16", "int4_weight_only", "int8_dynamic", "int8_weight_only"]
    assert sorted(LAYER_RECIPES) == sorted(others + by_gptq)


@pytest.mark.parametrize("name", LAYER_RECIPES)
def test_recipes_of_layers_start_with_what_they_are_called_and_get_safer(name: str) -> None:
    schemes = [SCHEMES[scheme] for scheme in get(name).schemes]
    first = {"int8_dynamic": "int8 dynamic", "int8_weight_only": "int8 weights", "int4_weight_only": "int4 weights"}
    assert schemes[0].action == first.get(name.removesuffix("_gptq"), name)
    safer = ["int4 weights", "int8 dynamic", "int8 weights", "bfloat16", "float16"]
    assert [safer.index(scheme.action) for scheme in schemes] == sorted(safer.index(s.action) for s in schemes)


def test_dict_changes_fields_of_the_recipe_of_its_name() -> None:
    recipe = get({"name": "int8_dynamic", "floor_db": 30, "schemes": ["dynamic"]})
    assert recipe == LayerRecipe("int8_dynamic", ("dynamic",), floor_db=30)
    assert RECIPES["int8_dynamic"].floor_db == 20.0
    with pytest.raises(FrozenInstanceError):
        recipe.floor_db = 1.0
    assert get({"name": "int8", "weight": {"bits": 4}}) == Recipe(weight=IntegerSpec(bits=4))
    assert get({"percentile": 99.0}) == Recipe(percentile=99.0)
    assert get({"overrides": {"head": "float"}}) == Recipe(overrides={"head": "float"})


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("int3", r"`recipe` to be one of .*'int8_dynamic'.*, but got 'int3'"),
        ({"name": "int8_dynamic", "bits": 3}, r"fields out of .*'floor_db'.*, but got \['bits'\]"),
        ({"name": "int8", "floor_db": 3}, r"fields out of .*'percentile'.*, but got \['floor_db'\]"),
    ],
)
def test_unknown_name_or_field(recipe: object, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        get(recipe)


@pytest.mark.parametrize("bits", [1, 16])
def test_grids_without_kernels_are_refused(bits: int) -> None:
    with pytest.raises(QuantizationError, match=rf"`bits` to be in \[2, 8\], but got {bits}: no runtime"):
        IntegerSpec(bits=bits)
    with pytest.raises(QuantizationError, match=r"Keep layers float with `overrides`"):
        get({"name": "int8", "activation": {"bits": bits}})
