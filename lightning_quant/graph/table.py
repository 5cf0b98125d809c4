"""What a runtime executes in integers, and what the user wants executed in integers. Data only."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from lightning_quant.numerics.grid import FEWER_THAN_8, INTEGERS_8, Grid


@dataclass(frozen=True)
class OperatorTable:
    """What one runtime executes in integers.

    Attributes:
        weighted: kinds with an integer kernel for weight and input.
        fused_activations: clipping activations that the output's range takes over.
        float_output: kinds whose integer kernel may answer in float.
        own_scale: other kinds with an integer kernel that has its own output scale.
        shared_scale: kinds that move values without changing them: input and output share one scale.
        reasons: kind to reason, for kinds that stay float.
        grids: of activations that it runs.
        in_float: why all of it computes in float, where weights are stored in integers and activations are rounded
            without integer kernels; empty where there are such.
        fuses_add: whether a convolution adds another quantized tensor before it rounds, so that nothing is rounded
            between convolution and addition.
        adds_activated: whether it does so behind an activation, too.
        one_channel: why convolutions of a single input channel stay float; empty when they do not.
        padded_average: why averages that count padded zeros stay float; empty when they do not.
        fuses_pad: whether a padding before a convolution disappears in it; otherwise what it makes is quantized.
        quantized_unasked: kinds that stay float in plans, and that the runtime would run in integers of its own choice.
        moves_dequantization: whether dequantization moves behind pools, reshapes and clips, which changes averages.
    """

    weighted: frozenset[str]
    fused_activations: frozenset[str]
    float_output: frozenset[str]
    own_scale: frozenset[str]
    shared_scale: frozenset[str]
    reasons: Mapping[str, str] = field(default_factory=dict)
    grids: frozenset[Grid] = INTEGERS_8
    in_float: str = ""
    fuses_add: bool = False
    adds_activated: bool = False
    fuses_pad: bool = True
    one_channel: str = ""
    padded_average: str = ""
    quantized_unasked: frozenset[str] = frozenset()
    moves_dequantization: bool = False

    def on(self, grid: Grid) -> "OperatorTable":
        """Return the table for one of its grids.

        Symmetric ranges take over no clip, which keeps to the grid of what it clips instead.
        """
        in_float = (
            ""
            if grid in INTEGERS_8 | FEWER_THAN_8
            else f"activations on {grid} have no integer kernels, it computes in float"
        )
        if not grid.symmetric:
            return replace(self, in_float=in_float)
        moves = self.shared_scale | self.fused_activations
        return replace(self, fused_activations=frozenset(), shared_scale=moves, in_float=in_float)


@dataclass(frozen=True)
class Selection:
    """Which operators the user wants quantized: fnmatch patterns on qualified names and on layer types.

    Attributes:
        include: what may be quantized.
        exclude: what stays float.
        stored: what is no part of a graph because a recipe of layers stores its weights, with that recipe's name.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    stored: tuple[tuple[str, str], ...] = ()

    def refusal(self, name: str, layer: str) -> str:
        """Return why an operator is not wanted, or an empty text."""
        stored = next((f"left to {recipe}" for pattern, recipe in self.stored if matches(pattern, name, layer)), "")
        return self.exclusion(name, layer) or stored

    def exclusion(self, name: str, layer: str) -> str:
        """Return why an operator is to stay float, or an empty text."""
        if not any(matches(pattern, name, layer) for pattern in self.include):
            return "not in `include`"
        excluded_by = next((pattern for pattern in self.exclude if matches(pattern, name, layer)), None)
        return "" if excluded_by is None else f'excluded by "{excluded_by}"'


def matches(pattern: str, name: str, layer: str) -> bool:
    """Tell whether a pattern names an operator, by qualified name (a module names all inside it) or layer type."""
    return fnmatchcase(name, pattern) or fnmatchcase(layer, pattern) or name.startswith(f"{pattern}.")
