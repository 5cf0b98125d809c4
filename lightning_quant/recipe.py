"""WHAT is quantized: a recipe names the numerics of weights and activations.

A new named recipe is one constant in `RECIPES`.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from lightning_quant.errors import QuantizationError


@dataclass(frozen=True)
class IntegerSpec:
    """The integer grid of one tensor role.

    Attributes:
        bits: width of the grid, in [2, 8]; the storage type stays int8 or uint8.
        symmetric: zero is in the middle and values lie in [-(2**(bits-1)-1), 2**(bits-1)-1]; otherwise the grid is
            [0, 2**bits-1] with a zero point that represents 0.0 exactly.
        per_channel: one scale for each output channel, shape `(out_channels,)`; otherwise one scale for the tensor.
    """

    bits: int = 8
    symmetric: bool = False
    per_channel: bool = False

    @property
    def quant_min(self) -> int:
        """Lowest integer of the grid."""
        return -(2 ** (self.bits - 1) - 1) if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        """Highest integer of the grid."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1


@dataclass(frozen=True)
class Recipe:
    """Named numerics of a quantized model.

    Attributes:
        name: how logs and manifests call it.
        weight: grid of the weights.
        activation: grid of the activations.
        calibration_observer: how post-training calibration turns data into ranges, a name from
            `lightning_quant.observers`: "min_max", "moving_average", "percentile" or "mse".
        training_observer: the same for quantization-aware training.
        bias_correction: whether calibration takes the mean of the weights' rounding error out of the biases.
        percentile: share of the values, in percent, that the "percentile" observer keeps inside the range.
    """

    name: str = "int8"
    weight: IntegerSpec = field(default_factory=lambda: IntegerSpec(symmetric=True, per_channel=True))
    activation: IntegerSpec = field(default_factory=IntegerSpec)
    calibration_observer: str = "mse"
    training_observer: str = "moving_average"
    bias_correction: bool = True
    percentile: float = 99.99


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(),
        # Without VNNI, x86 kernels add two uint8 x int8 products in 16 bits, which saturates for full-range weights.
        Recipe(name="int8_reduce_range", weight=IntegerSpec(bits=7, symmetric=True, per_channel=True)),
    )
}


def get(recipe: "str | dict[str, Any] | Recipe") -> Recipe:
    """Return the recipe of that name, or build one from its fields, or pass a `Recipe` through.

    Raises:
        QuantizationError: the name or a field is unknown.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, dict):
        return _from_dict(recipe)
    if recipe not in RECIPES:
        raise QuantizationError(f"Expected `recipe` to be one of {sorted(RECIPES)} or a `Recipe`, but got {recipe!r}.")
    return RECIPES[recipe]


def _from_dict(values: dict[str, Any]) -> Recipe:
    known = {item.name for item in fields(Recipe)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise QuantizationError(f"Expected `recipe` to have fields out of {sorted(known)}, but got {unknown}.")
    specs = {
        k: IntegerSpec(**v) if isinstance(v, dict) else v for k, v in values.items() if k in ("weight", "activation")
    }
    return Recipe(**{**values, **specs})
