"""WHAT is quantized where there is no graph: the numerics of weights, layer by layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lightning_quant.arguments.arguments import check_flag, check_number, check_positive, check_texts
from lightning_quant.arguments.keywords import known_arguments
from lightning_quant.errors import QuantizationError


@known_arguments
@dataclass(frozen=True)
class LayerRecipe:
    """Named numerics of a model that is quantized layer by layer, without a graph and without calibration.

    A layer gets the first scheme whose output, on the captured call, is close enough to the float layer's; a layer for
    which none is stays float, with the reason in the plan.

    Attributes:
        name: how logs and manifests call it.
        schemes: names out of `lightning_quant.layers.storage.SCHEMES`, the wanted one first, then safer ones.
        floor_db: signal-to-noise ratio in decibels that a layer's output must reach.
        group_size: values of a row that share a scale, for 4-bit weights.
        gptq: whether the integers of linear layers' weights are chosen by the layers' outputs instead of rounding to
            nearest; see `lightning_quant.numerics.gptq`.
        bias_correction: whether the mean of what a layer reads on the captured call, times the error of its weights, is
            taken out of its bias.
        min_stored_share: share of the weights' values that must be stored with fewer bits, in [0, 1]; below it the
            report says that the recipe failed.
        overrides: fnmatch pattern on qualified names or layer types to what these layers are instead: "float", or the
            name of another recipe of layers, whose schemes and floor count; the first pattern that matches does.
    """

    needs_calibration: ClassVar[Literal[False]] = False

    name: str
    schemes: tuple[str, ...]
    floor_db: float = 20.0
    group_size: int = 32
    gptq: bool = False
    bias_correction: bool = True
    min_stored_share: float = 0.75
    overrides: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_texts("schemes", self.schemes, "['weight_only']")
        check_number("floor_db", self.floor_db, -math.inf)
        check_number("min_stored_share", self.min_stored_share, 0, 1)
        check_positive("group_size", self.group_size)
        check_flag("gptq", self.gptq)
        if not isinstance(self.overrides, Mapping):
            raise QuantizationError(
                f"Expected `overrides` to be a dict such as {{'head': 'float'}}, but got {self.overrides!r:.60}."
            )

    @property
    def exported(self) -> "LayerRecipe":
        """The recipe itself: there is nothing that models of another one export alike with."""
        return self

    @property
    def needed_calls(self) -> int:
        """Number of calls that are needed: one, to try the layers on."""
        return 1

    @property
    def usual_db(self) -> float:
        """Signal-to-noise ratio in decibels that outputs usually reach; four bits vary too much to say."""
        if any("4bit" in scheme for scheme in self.schemes):
            return 0.0
        return 25.0 if "dynamic" in self.schemes else 30.0

    @property
    def against_noise(self) -> str:
        """What helps against too much of it, in words."""
        if any("4bit" in scheme for scheme in self.schemes):
            return "Try recipe 'int8_weight_only'"
        others = "'int8_weight_only' or 'float16'" if "dynamic" in self.schemes else "'float16'"
        return f"Try recipe {others}, or keep layers float with `exclude`"
