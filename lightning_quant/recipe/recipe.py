"""WHAT is quantized: a recipe names the numerics of weights and activations.

A new named recipe is one constant in `RECIPES`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from lightning_quant.arguments.arguments import check_fields, check_flag, check_number, check_texts
from lightning_quant.arguments.choice import check_choice, closest
from lightning_quant.arguments.keywords import known_arguments
from lightning_quant.arguments.names import Observers, Recipes
from lightning_quant.errors import QuantizationError
from lightning_quant.numerics.grid import Grid, IntegerSpec, activation_grid, weight_grid
from lightning_quant.recipe.layer_recipe import LayerRecipe

PERCENTILE = 99.99
# Observers that look at no percentile; own ones may.
_WITHOUT_PERCENTILE = {"min_max", "moving_average", "mse"}


@known_arguments
@dataclass(frozen=True)
class Recipe:
    """Named numerics of a quantized model.

    Attributes:
        name: how logs and manifests call it.
        weight: grid of the weights, symmetric and per channel, of at most 8 bits.
        activation: grid of the activations, per tensor. A runtime's `TABLE.grids` says which it runs: 8 bits
            everywhere; fewer on "onnxruntime" and "openvino", in kernels of 8 bits; 16 bits on "onnxruntime", which
            stores weights in 8 bits and computes in float.
        calibration_observer: how post-training calibration turns data into ranges, a name from
            `lightning_quant.ranges.observers`: "min_max", "moving_average", "percentile" or "mse".
        training_observer: the same for quantization-aware training.
        bias_correction: whether calibration takes the mean of the weights' rounding error out of the biases.
        align_channels: whether calibration centers and scales the channels of a tensor where that costs the weights
            around it nothing, and brings the output nearer to float's. See `lightning_quant.calibrate.alignment`.
        overrides: fnmatch pattern on qualified names or layer types to what these layers are instead: "float";
            "int4_weights" to "int8_weights", or another recipe with the same activations, for another grid of the
            weights, where the first pattern that matches counts; or a recipe of layers that leaves activations float
            ("int8_weight_only", "int4_weight_only", "float16"), which also knows embeddings and recurrent layers, on
            runtimes that run both; training leaves these in float, and what is exported is rounded.
        accuracy_steps: what calibration tries beyond ranges and bias correction, names from
            `lightning_quant.calibrate.steps`, each kept only when it lowers the error on batches that it was not fitted
            to. In quantization-aware training there is no calibration, and training itself takes their place.
        max_passes: how often calibration may run its batches for accuracy steps, in float or rounded; a step that would
            take more is left out. Work and not time, so that what else a machine does changes no result.
        learned_step_rate: learning rate, in logarithms, of the weights' scales in quantization-aware training; 0 takes
            them from the largest weights instead. Grids of few bits want it.
        percentile: share of the values, in percent, that the "percentile" observer keeps inside the range.
        batch_norm_batches: training batches on which BatchNorm's statistics are measured anew for the artifact after
            quantization-aware training, under rounding and with the final weights, and kept where the loss on other
            batches is less with them; 0 keeps those of training. See `lightning_quant.calibrate.batch_norm`.
        learned_ranges: whether `learned_step_rate` also moves scales and zero points of activations, until the schedule
            freezes ranges; not of those that keep eight bits by `wide_ends`.
        wide_ends: whether eight bits are kept by the first and the last weighted operator and what they read, and by
            what others than products read, such as the terms of a sum, which products round anew; not where there is no
            other weighted operator.
        damping: how strongly learned weights are drawn to the integers that they are rounded to, growing over the run:
            those that lie between two would go to and fro.
        distill: weight of the float module as a teacher in training, where the callback says none itself.
    """

    # Whether it quantizes a graph, with ranges that calibration or training teaches.
    needs_calibration: ClassVar[Literal[True]] = True

    name: str = "int8"
    weight: IntegerSpec = field(default_factory=lambda: IntegerSpec(symmetric=True, per_channel=True))
    activation: IntegerSpec = field(default_factory=IntegerSpec)
    calibration_observer: Observers = "mse"
    training_observer: Observers = "moving_average"
    bias_correction: bool = True
    align_channels: bool = True
    overrides: dict[str, str] = field(default_factory=dict)
    accuracy_steps: tuple[str, ...] = ()
    max_passes: float = 1000.0
    learned_step_rate: float = 0.0
    percentile: float = PERCENTILE
    batch_norm_batches: int = 0
    learned_ranges: bool = False
    wide_ends: bool = False
    damping: float = 0.0
    distill: float = 0.0

    def __post_init__(self) -> None:
        for role in ("weight", "activation"):
            spec = getattr(self, role)
            if not isinstance(spec, IntegerSpec):
                raise QuantizationError(
                    f"Expected `{role}` to be a dict such as {{'bits': 4}} or an `IntegerSpec`, but got {spec!r:.60}."
                )
            self._check_kernels(role, spec)
        for name in ("max_passes", "learned_step_rate", "batch_norm_batches", "damping", "distill"):
            check_number(name, getattr(self, name))
        check_flag("learned_ranges", self.learned_ranges)
        check_flag("wide_ends", self.wide_ends)
        check_number("percentile", self.percentile)
        if not 50 < self.percentile <= 100:
            raise QuantizationError(f"Expected `percentile` to be in (50, 100], but got {self.percentile}.")
        check_flag("bias_correction", self.bias_correction)
        check_flag("align_channels", self.align_channels)
        check_texts("accuracy_steps", self.accuracy_steps, "['adaround']")
        if not isinstance(self.overrides, Mapping):
            raise QuantizationError(
                f"Expected `overrides` to be a dict such as {{'head': 'float'}}, but got {self.overrides!r:.60}."
            )

    @property
    def weight_grid(self) -> Grid:
        """Integers of the weights."""
        return weight_grid(self.weight.bits)

    @property
    def activation_grid(self) -> Grid:
        """Integers of the activations."""
        return activation_grid(self.activation.bits, symmetric=self.activation.symmetric)

    @property
    def exported(self) -> "Recipe":
        """The same without what changes numbers alone: models of recipes that are equal in this export alike."""
        return replace(self, name="", accuracy_steps=(), max_passes=0.0)

    @property
    def needed_calls(self) -> int:
        """Least number of calls to calibrate on: accuracy steps are judged on others than they learn from."""
        return 2 if self.accuracy_steps else 1

    @property
    def usual_db(self) -> float:
        """Signal-to-noise ratio in decibels that outputs usually reach; fewer than eight bits vary too much to say."""
        return 25.0 if self.weight.bits == 8 and self.activation.bits >= 8 else 0.0

    @property
    def against_noise(self) -> str:
        """What helps against too much of it, in words."""
        steps = "" if self.accuracy_steps else "Try recipe 'int8_accurate', or keep"
        return f"{steps or 'Keep'} the layers float that `sensitivity=True` finds, with `exclude`"

    def _check_kernels(self, role: str, spec: IntegerSpec) -> None:
        """Refuse what no integer kernel takes."""
        what = ""
        if role == "weight" and not (spec.symmetric and spec.per_channel):
            what = "symmetric with one scale for each output channel: integer kernels take weights without zero points"
        elif role == "weight" and spec.bits > 8:
            what = "of at most 8 bits, in which integer kernels read them"
        elif role == "activation" and spec.per_channel:
            what = "of one scale for the tensor: integer kernels sum over channels before they scale"
        if what:
            raise QuantizationError(
                f"Expected `{role}` to be {what}, but got {spec}. A dict with nothing but `bits` leaves the rest as it "
                f"is: {{'{role}': {{'bits': {min(spec.bits, 8)}}}}}."
            )

    def check_percentile(self, observer: str) -> None:
        """Refuse a percentile that no observer of a run takes.

        Raises:
            QuantizationError: neither the observer nor those of the recipe do.
        """
        used = {observer, self.calibration_observer, self.training_observer}
        if self.percentile != PERCENTILE and used <= _WITHOUT_PERCENTILE:
            raise QuantizationError(
                f"Expected `percentile` to be for an observer that takes one, but got {self.percentile} beside "
                f"{self.calibration_observer!r} and {self.training_observer!r}. Set `calibration_observer` or "
                "`training_observer` to 'percentile'."
            )


AnyRecipe = Recipe | LayerRecipe
# A minute where `int8` takes seconds; the cheapest steps first.
INT8_ACCURATE = Recipe(
    name="int8_accurate",
    accuracy_steps=("correct_outputs", "migrate", "gptq", "scale_channels"),
)
RECIPES: dict[str, AnyRecipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(),
        INT8_ACCURATE,
        # Four-bit weights in int8 kernels: no smaller file in every runtime, but what four-bit hardware computes.
        Recipe(
            name="int4_weights",
            weight=IntegerSpec(bits=4, symmetric=True, per_channel=True),
            accuracy_steps=("migrate", "shrink_scales", "gptq", "correct_outputs", "scale_depthwise"),
            learned_step_rate=1e-3,
            wide_ends=True,
            batch_norm_batches=16,
        ),
        # Three values for each weight, which few networks bear without training. Stored in four bits.
        Recipe(
            name="int2_weights",
            weight=IntegerSpec(bits=2, symmetric=True, per_channel=True),
            accuracy_steps=("migrate", "shrink_scales", "gptq", "correct_outputs", "scale_depthwise"),
            learned_step_rate=1e-3,
            wide_ends=True,
            batch_norm_batches=16,
        ),
        # Activations of four bits as well, in int8 kernels behind which their integers are clipped.
        Recipe(
            name="int4",
            weight=IntegerSpec(bits=4, symmetric=True, per_channel=True),
            activation=IntegerSpec(bits=4),
            accuracy_steps=("migrate", "shrink_scales", "gptq", "correct_outputs", "scale_depthwise"),
            # Chosen on held-back training images of the low-bit benchmark, out of 1e-3, 3e-3 and 1e-2, which ended a
            # MobileNetV2 at 42 % where 3e-3 reached 76.
            learned_step_rate=3e-3,
            learned_ranges=True,
            wide_ends=True,
            batch_norm_batches=16,
        ),
        # Without VNNI, x86 kernels add two uint8 x int8 products in 16 bits, which saturates for full-range weights.
        Recipe(name="int8_reduce_range", weight=IntegerSpec(bits=7, symmetric=True, per_channel=True)),
        LayerRecipe("int8_dynamic", ("dynamic", "weight_only")),
        LayerRecipe("int8_weight_only", ("weight_only",)),
        LayerRecipe("int4_weight_only", ("weight_only_4bit", "weight_only"), floor_db=12.0),
        LayerRecipe("int8_weight_only_gptq", ("weight_only",), gptq=True),
        LayerRecipe("int4_weight_only_gptq", ("weight_only_4bit", "weight_only"), floor_db=12.0, gptq=True),
        LayerRecipe("float16", ("float16",), floor_db=40.0),
        LayerRecipe("bfloat16", ("bfloat16",), floor_db=30.0),
    )
}


def get(recipe: "Recipes | dict[str, Any] | AnyRecipe") -> AnyRecipe:
    """Return the recipe of that name, or build one from its fields, or pass one through.

    A dict whose `name` is that of a known recipe changes fields of it; any other makes a new `Recipe`, or, where it has
    `schemes`, a new `LayerRecipe`.

    Raises:
        QuantizationError: the name or a field is unknown, or a name inside it.
    """
    if isinstance(recipe, dict):
        recipe = _from_dict(recipe)
    if isinstance(recipe, Recipe | LayerRecipe):
        if RECIPES.get(recipe.name) != recipe:
            from lightning_quant.recipe.recipe_names import check_names

            check_names(recipe)
        return recipe
    others = " or a `Recipe`, a `LayerRecipe` or a dict of fields"
    if not isinstance(recipe, str | int | float | type | None) and isinstance(recipe, Iterable):
        others += " (data is `calibration_data=`)"
    check_choice("recipe", recipe, RECIPES, others)
    return RECIPES[recipe]


def spelled(recipe: AnyRecipe) -> str | dict[str, Any]:
    """Return what `get` makes the same recipe of: its name, or a dict of what is not as in the one it builds upon."""
    named = RECIPES.get(recipe.name)
    base = named if type(named) is type(recipe) else _new(vars(recipe))
    if base == recipe:
        return recipe.name
    return {"name": recipe.name, **_changed(base, recipe)}


def _new(values: Mapping[str, Any]) -> AnyRecipe:
    """Return what a recipe with a name of its own builds upon; fields tell of which kind it is."""
    return LayerRecipe("", ()) if "schemes" in values else Recipe(name="")


def _changed(base: Any, value: Any) -> dict[str, Any]:
    """Return the fields in which a dataclass is not as another; of those that are grids, their fields."""
    pairs = {item.name: (getattr(base, item.name), getattr(value, item.name)) for item in fields(base)}
    return {
        name: _changed(before, after) if isinstance(after, IntegerSpec) else after
        for name, (before, after) in pairs.items()
        if before != after
    }


def _from_dict(values: dict[str, Any]) -> AnyRecipe:
    name = values.get("name", "int8")
    if not isinstance(name, str) or (name not in RECIPES and closest(name, RECIPES, cutoff=0.9)):
        # Else the numerics of `int8` would go under a name that says something else.
        check_choice("recipe.name", name, RECIPES, " or a name unlike them")
    base = RECIPES.get(name) or _new(values)
    check_fields("recipe", values, [item.name for item in fields(base)])
    grids = {item.name for item in fields(base) if isinstance(getattr(base, item.name), IntegerSpec)}
    changed = {k: _grid(base, k, v) if k in grids and isinstance(v, dict) else v for k, v in values.items()}
    return replace(base, **{k: tuple(v) if isinstance(v, list) else v for k, v in changed.items()})  # type: ignore


def _grid(base: AnyRecipe, role: str, values: dict[str, Any]) -> IntegerSpec:
    """Return the grid of a recipe's role with fields changed."""
    check_fields(f"recipe.{role}", values, [item.name for item in fields(IntegerSpec)])
    return replace(getattr(base, role), **values)
