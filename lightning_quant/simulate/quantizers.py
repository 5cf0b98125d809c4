"""The state of a module's quantizers: ranges, what calibration and training taught, and the phase.

All of it lies outside the module, which owns every weight that this is about.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.errors import QuantizationError
from lightning_quant.graph.analyze import Analysis, Island
from lightning_quant.graph.plan import Edge, Operator
from lightning_quant.numerics.adjustments import AccuracyStep, ChannelScale, FoldedLayer
from lightning_quant.numerics.bias_correction import InputMeans, bias_correction
from lightning_quant.numerics.fake_quantize import affine_parameters
from lightning_quant.numerics.folding import Folded, Statistics, fold, fold_adjusted, statistics, with_affine
from lightning_quant.numerics.learned_steps import LearnedSteps, first_range, quantize_with_learned_range
from lightning_quant.planned.overrides import override_weights, wide_edges
from lightning_quant.ranges.grids import widen
from lightning_quant.ranges.ranges import Ranges
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.surgery.routing import device_of, evaluation_mode, fetch, resolve

PHASES = ("off", "observe", "fake_quantize", "frozen", "frozen_batch_norm")


@dataclass
class Control:
    """What phase a module is in, and whether it observes; shared with copies that users make of it meanwhile."""

    phase: str = "off"
    observing: bool = False


class Quantizers:
    """What is known of the edges and operators of a module's graphs.

    Attributes:
        root: the module whose weights are rounded.
        islands: path to graph.
        operators: identity to operator.
        ranges: observers and scales of every edge.
        control: the phase, which is "off", "observe", "fake_quantize", "frozen" (ranges fixed) or "frozen_batch_norm"
            (and BatchNorm uses its running statistics), in the order of training; and whether ranges follow.
        is_twin: whether it belongs to a copy of a routed module, which moves no ranges.
        bias_corrections: operator to what is added to its folded bias, `(out_channels,)`.
        learned_steps: the weights' scales while they are trained; None where they follow from the weights.
        layers: operator to the layer that stands in for the module's own, where an accuracy algorithm changed it.
        channels: edge to how its values map on the grid, where they are not rounded as they are.
        accuracy_steps: what calibration tried for accuracy, and what came of it.
    """

    root: nn.Module
    recipe: Recipe

    def __init__(self, root: nn.Module, analysis: Analysis, recipe: Recipe, observer: str) -> None:
        self.root, self.recipe, self.observer = root, recipe, observer
        self.islands: dict[str, Island] = {island.path: island for island in analysis.islands}
        graphs = [island.plan for island in analysis.islands]
        self.operators: dict[str, Operator] = {o.identity: o for graph in graphs for o in graph.operators}
        edges: dict[str, Edge] = {edge.identity: edge for graph in graphs for edge in graph.edges}
        self.weight_quant_maxima = override_weights(recipe, self.operators, analysis)
        self.ranges = Ranges(edges, recipe, observer, wide_edges(recipe, self.operators, edges))
        self.control, self.is_twin = Control(), False
        self.bias_corrections: dict[str, Tensor] = {}
        self.layers: dict[str, FoldedLayer] = {}
        self.channels: dict[str, ChannelScale] = {}
        self.learned_steps: LearnedSteps | None = None
        self.accuracy_steps: tuple[AccuracyStep, ...] = ()

    @property
    def phase(self) -> str:
        """The present phase."""
        return self.control.phase

    @property
    def observing(self) -> bool:
        """Whether tensors that pass update the ranges, in phases that have not frozen them."""
        return self.control.observing and not self.is_twin

    @observing.setter
    def observing(self, value: bool) -> None:
        self.control.observing = value

    @property
    def observes(self) -> bool:
        """The same of the present phase."""
        return self.observing and self.phase in ("observe", "fake_quantize")

    def set_phase(self, phase: str) -> None:
        """Change the phase.

        Raises:
            QuantizationError: no phase has that name.
        """
        if phase not in PHASES:
            raise QuantizationError(f"Expected `phase` to be one of {PHASES}, but got {phase!r}.")
        self.control.phase = phase

    @property
    def quantizes(self) -> bool:
        """Whether tensors are rounded in this phase."""
        return self.phase in PHASES[2:]

    @property
    def learns_ranges(self) -> bool:
        """Whether gradients move ranges of activations now."""
        learning = self.ranges.learned is not None and self.phase == "fake_quantize" and not self.is_twin
        return learning and self.root.training and torch.is_grad_enabled()

    def learns_range(self, identity: str) -> bool:
        """Tell whether they move that of an edge: of those with few bits.

        Where eight are kept beside them, nearly nothing depends on the range, and Adam moves it by noise all the same.
        """
        return self.learns_ranges and identity not in self.ranges.wide

    def begin_learning(self) -> None:
        """Learn the steps of weights, and the ranges of activations, as the recipe says."""
        if self.recipe.learned_step_rate > 0 and self.learned_steps is None:
            self.learned_steps = LearnedSteps(self.recipe.learned_step_rate)
            self.ranges.learned = self.learned_steps if self.recipe.learned_ranges else None

    def move_learned(self, reduce: Callable[[Tensor], Tensor], factor: float, rate: tuple[int, float]) -> None:
        """Move what is learned by its gradients; see `LearnedSteps.update`."""
        if self.learned_steps is not None and self.quantizes:
            self.learned_steps.update(reduce, factor=factor, with_edges=self.phase == "fake_quantize", rate=rate)
            self.ranges.forget_parameters()

    def round_learning(self, identity: str, x: Tensor, *, relu: bool = False) -> Tensor:
        """Round one tensor, or what a ReLU makes of it, with gradients for its range."""
        grid, learned = self.ranges.grid_of(identity), self.ranges.learned
        assert learned is not None

        def first() -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                return affine_parameters(*first_range(F.relu(x) if relu else x, grid), grid)

        values = learned.range_of(self.ranges.edges[identity].shared, first, grid)
        return quantize_with_learned_range(x, values, grid, relu)

    @property
    def adjusted(self) -> bool:
        """Whether calibration changed biases or layers, which only the integer computation knows of."""
        return bool(self.bias_corrections or self.layers)

    def on_grid(self, identity: str, x: Tensor, *, clipped: bool = False) -> Tensor:
        """Map values of an edge to those that are rounded, if wanted with the clip that the grid's end carries out."""
        channels = self.channels.get(identity)
        if channels is None:
            return x
        return channels.to_grid(x).clamp(max=channels.clip) if clipped else channels.to_grid(x)

    def folded(self, identity: str, *, corrected: bool = True, weight: Tensor | None = None) -> Folded:
        """Return bias and scales of a weighted operator as they are exported; the same in training and in convert.

        Args:
            identity: of the operator.
            corrected: whether with the correction of its bias.
            weight: what its forward has just computed as its weight, where it does.
        """
        operator = self.operators[identity]
        input_scale, _ = self.ranges.parameters(operator.reads[0])
        quant_max = self.weight_quant_max(identity)
        if identity in self.layers:
            folded = fold_adjusted(self.layers[identity], input_scale, quant_max)
        else:
            weight = self.weight(identity) if weight is None else weight
            step = None
            if self.learned_steps is not None:
                step = self.learned_steps.step_of(identity, weight, quant_max).detach()
            folded = fold(weight, *self.bias_and_norm(identity, weight), input_scale, quant_max, step)
        correction = self.bias_corrections.get(identity) if corrected else None
        return folded if correction is None else replace(folded, bias=folded.bias + correction.to(folded.bias))

    def bias_and_norm(self, identity: str, weight: Tensor) -> tuple[Tensor | None, Statistics | None]:
        """Return the bias of an operator of the module, and what is folded into it; None without.

        Args:
            identity: of the operator.
            weight: of it.
        """
        operator = self.operators[identity]
        bias = self._tensor(operator.path, operator.bias) if operator.bias else None
        norm = statistics(resolve(self.root, operator.path), operator.norm)
        steps = [(a, self._tensor(operator.path, a.constant) if a.constant else a.value) for a in operator.affine]
        return bias, with_affine(norm, steps, weight.detach().flatten(1)[:, 0])

    def weight(self, identity: str) -> Tensor:
        """Return the weight that `folded` belongs to: the module's own, or that of the layer in its place."""
        if identity in self.layers:
            return self.layers[identity].weight
        operator = self.operators[identity]
        return self._tensor(operator.path, operator.weight)

    def computes_weight(self, identity: str) -> bool:
        """Tell whether forward computes an operator's weight from parameters."""
        operator = self.operators[identity]
        return operator.weight in self.islands[operator.path].constants

    def weight_integers(self, identity: str, folded: Folded) -> Tensor:
        """Return a weight in whole steps of its scale, float32."""
        layer = self.layers.get(identity)
        if layer is not None and layer.integers is not None:
            return layer.integers
        return folded.integers(self.weight(identity), self.weight_quant_max(identity))

    def weight_quant_max(self, identity: str) -> int:
        """Return the highest integer of an operator's weight, after overrides."""
        own = self.weight_quant_maxima.get(identity, self.recipe.weight_grid.high)
        return max(own, min(((own + 1) << self.ranges.more_bits) - 1, 127))

    def anneal_bits(self, width: float) -> None:
        """Round to grids between the recipe's and those of eight bits; what is learned begins anew with each.

        Args:
            width: how much of the bits between them grids have, in [0, 1]; rounded up to whole bits.
        """
        bits = min(self.recipe.weight.bits, self.recipe.activation.bits)
        self._widen(math.ceil(width * max(8 - bits, 0)))

    def _widen(self, more_bits: int) -> None:
        if more_bits != self.ranges.more_bits:
            widen(self.ranges, more_bits)
            if self.learned_steps is not None:
                self.learned_steps.clear()

    @torch.no_grad()
    def correct_biases(self, means: InputMeans) -> None:
        """Correct every bias for the rounding of its weights, from the means of what the operators read."""
        self.bias_corrections.clear()
        for identity, mean in means.means.items():
            folded = self.folded(identity)
            self.bias_corrections[identity] = bias_correction(
                self.weight(identity), folded, self.weight_integers(identity, folded), mean
            )

    def to(self, device: torch.device) -> None:
        """Move what was learned to a device; other bindings of the plan share it, and fetch it when they run."""
        self.ranges.to(device)
        learned: Any
        # In place: bindings hold the same dicts.
        for learned in (self.bias_corrections, self.channels, self.layers):
            learned.update({identity: value.to(device) for identity, value in learned.items()})
        if self.learned_steps is not None:
            self.learned_steps.to(device)

    def take_over(self, other: "Quantizers") -> None:
        """Take over what calibration taught another binding of the same plan."""
        self.ranges, self.layers, self.channels = other.ranges, other.layers, other.channels
        self.bias_corrections, self.accuracy_steps = other.bias_corrections, other.accuracy_steps

    def state_dict(self) -> dict[str, Any]:
        """Return phase and ranges: tensors, numbers, strings and dicts only."""
        return {
            "phase": self.phase,
            "observers": self.ranges.state_dict(),
            "bias_corrections": dict(self.bias_corrections),
            **({} if self.learned_steps is None else {"learned_steps": self.learned_steps.state_dict()}),
            **({} if self.ranges.more_bits == 0 else {"more_bits": self.ranges.more_bits}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state; may be called more than once.

        Raises:
            QuantizationError: the state belongs to another model.
        """
        self.ranges.load_state_dict(state["observers"])
        self._widen(state.get("more_bits", 0))
        device = device_of(self.root)
        self.bias_corrections.clear()
        self.bias_corrections.update(state["bias_corrections"])
        if self.learned_steps is not None and "learned_steps" in state:
            self.learned_steps.load_state_dict(state["learned_steps"], device)
            self.ranges.forget_parameters()
        self.to(device)
        self.set_phase(state["phase"])

    def _tensor(self, path: str, name: str) -> Tensor:
        """Return a weight or bias of a graph's module, or what its forward computes as that."""
        module = resolve(self.root, path)
        computed = self.islands[path].constants.get(name)
        if computed is None:
            return fetch(module, name)
        with torch.no_grad(), evaluation_mode(module):
            return computed(module)
