from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from layer_models import LAYER_RECIPES
from torch import nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.errors import QuantizationError
from lightning_quant.export.prepare import prepare
from lightning_quant.layers.storage import SCHEMES
from lightning_quant.recipe.recipe import RECIPES, IntegerSpec, LayerRecipe, Recipe, get


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
    assert get({"name": "int8", "weight": {"bits": 4}}) == Recipe(
        weight=IntegerSpec(4, symmetric=True, per_channel=True)
    )
    assert get({"name": "int8_reduce_range", "activation": {"symmetric": True}}).weight.bits == 7
    by_percentile = {"percentile": 99.0, "calibration_observer": "percentile"}
    assert get(by_percentile) == Recipe(percentile=99.0, calibration_observer="percentile")
    assert get({"overrides": {"head": "float"}}) == Recipe(overrides={"head": "float"})


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("int3", r"`recipe` to be one of .*'int8_dynamic'.*, but got 'int3'"),
        ({"name": "int8_dynamic", "bits": 3}, r"fields out of .*'floor_db'.*, but got \['bits'\]"),
        ({"weight": {"bit": 3}}, r"`recipe.weight` to have fields out of .*'bits'.*, but got \['bit'\]"),
        ({"name": "int8", "floor_db": 3}, r"fields out of .*'percentile'.*, but got \['floor_db'\]"),
    ],
)
def test_unknown_name_or_field(recipe: object, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        get(recipe)


@pytest.mark.parametrize("bits", [1, 17])
def test_grids_without_kernels_are_refused(bits: int) -> None:
    with pytest.raises(QuantizationError, match=rf"`bits` to be in \[2, 16\], but got {bits}: no runtime"):
        IntegerSpec(bits=bits)
    with pytest.raises(QuantizationError, match=r"Keep layers float with `overrides`"):
        get({"name": "int8", "activation": {"bits": bits}})


WEIGHT, ACTIVATION = IntegerSpec(symmetric=True, per_channel=True), IntegerSpec()
# Every field of a grid and of a recipe of graphs has another value here than by itself, and either is refused ...
REFUSED = {
    "weight.symmetric": {"weight": replace(WEIGHT, symmetric=False)},
    "weight.per_channel": {"weight": replace(WEIGHT, per_channel=False)},
    "weight.bits": {"weight": replace(WEIGHT, bits=9)},
    "activation.per_channel": {"activation": replace(ACTIVATION, per_channel=True)},
    "percentile": {"percentile": 10.0},
    "max_passes": {"max_passes": -1.0},
    "batch_norm_batches": {"batch_norm_batches": -1},
    "learned_step_rate": {"learned_step_rate": -0.1},
    "damping": {"damping": -1.0},
    "distill": {"distill": -1.0},
}
# ... or changes the numbers; a few of them in training alone, and are tested with it.
CHANGING = {
    "weight.bits": {"weight": WEIGHT},
    "activation.bits": {"activation": replace(ACTIVATION, bits=16)},
    "activation.symmetric": {"activation": replace(ACTIVATION, symmetric=True)},
    "calibration_observer": {"calibration_observer": "min_max"},
    "bias_correction": {"bias_correction": False},
    "align_channels": {"align_channels": False},
    "overrides": {"overrides": {"0": "float"}},
    "accuracy_steps": {"accuracy_steps": ("gptq", "shrink_scales")},
    "wide_ends": {"wide_ends": True},
}
IN_TRAINING = {"training_observer", "learned_ranges"}


def answers(recipe: Recipe) -> torch.Tensor:
    """Return what a calibrated net answers on a batch."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
    )
    net[0].weight.data[0] *= 9
    batches = [(torch.randn(32, 3, 8, 8),) for _ in range(8)]
    prepared = prepare(net.eval(), batches[0], recipe=recipe, observer=recipe.calibration_observer)
    calibrate(prepared, steps_of(prepared, batches))
    with torch.no_grad(), prepared.attached("frozen"):
        return net(*batches[0])


def test_every_field_is_tried() -> None:
    names = {item.name for item in fields(Recipe)} - {"name", "weight", "activation"}
    grids = {f"{role}.{item.name}" for role in ("weight", "activation") for item in fields(IntegerSpec)}
    assert set(CHANGING) | set(REFUSED) | IN_TRAINING == names | grids


@pytest.mark.parametrize("field", list(CHANGING))
def test_every_field_changes_the_numbers(field: str) -> None:
    base = {"weight": replace(WEIGHT, bits=4)}
    assert not torch.equal(answers(Recipe(**{**base, **CHANGING[field]})), answers(Recipe(**base)))


@pytest.mark.parametrize("field", list(REFUSED))
def test_or_is_refused_in_one_sentence(field: str) -> None:
    with pytest.raises(QuantizationError, match=rf"Expected `{field.partition('.')[0]}` to be .*, but got .*\."):
        Recipe(**REFUSED[field])


def test_a_percentile_for_no_observer_is_refused_with_the_plan() -> None:
    with pytest.raises(QuantizationError, match=r"`percentile` to be for an observer .* got 90.0 beside 'mse'"):
        answers(Recipe(percentile=90.0))


def test_the_percentile_counts_where_an_observer_takes_it() -> None:
    narrow, wide = (Recipe(calibration_observer="percentile", percentile=share) for share in (90.0, 99.9))
    assert not torch.equal(answers(narrow), answers(wide))


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_shares_are_shares(share: float) -> None:
    with pytest.raises(QuantizationError, match=r"`min_stored_share` to be in \[0, 1\], but got"):
        LayerRecipe("mine", ("weight_only",), min_stored_share=share)
