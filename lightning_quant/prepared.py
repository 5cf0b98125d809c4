"""A module with its plan and the state of its quantizers, routed to graphs that round.

Only `forward` of the module (or of its islands) is routed to a graph that calls the user's own submodules by path.
Observers and ranges are plain tensors outside the module.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_quant.adjustments import ChannelScale, Layer
from lightning_quant.bias_correction import InputMeans, bias_correction
from lightning_quant.calls import CallSpec
from lightning_quant.compilation import kept_from_compilers
from lightning_quant.errors import QuantizationError
from lightning_quant.folding import Folded, fold, fold_adjusted, statistics
from lightning_quant.graph.analyze import Analysis, Island
from lightning_quant.graph.instrument import Instrumented
from lightning_quant.graph.leftovers import left_in_float
from lightning_quant.graph.plan import Edge, Operator, Plan, identify, path_of
from lightning_quant.host import HOST, copied_to, on_host
from lightning_quant.layers.placement import placed
from lightning_quant.learned_steps import LearnedSteps
from lightning_quant.overrides import override_weights, store_layers
from lightning_quant.planned_model import PlannedModel
from lightning_quant.ranges import Ranges
from lightning_quant.recipe import Recipe
from lightning_quant.routing import Route, copied, device_of, evaluation_mode, fetch, resolve, route, unroute
from lightning_quant.running import Runner
from lightning_quant.simulation import Simulation

PHASES = ("off", "observe", "fake_quantize", "frozen", "frozen_batch_norm")


@dataclass
class Control:
    """What phase a module is in, and whether it observes; shared with copies that users make of it meanwhile."""

    phase: str = "off"
    observing: bool = False


class RoutedForward(Route):
    """What stands in a module's `__dict__` as `forward`; a deepcopy of the module gets its own."""

    def __init__(self, prepared: "Prepared", path: str) -> None:
        self.prepared, self.path = prepared, path
        self._run = kept_from_compilers(prepared.run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the prepared graph."""
        if torch.compiler.is_compiling() and self.prepared.is_traceable(self.path, args, kwargs):
            return self.prepared.run(self.path, args, kwargs)
        return self._run(self.path, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoutedForward":
        return RoutedForward(copy.deepcopy(self.prepared, memo), self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {"prepared": self.prepared, "path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class Prepared(PlannedModel):
    """A module, its plan, and the state of its quantizers.

    Attributes:
        root: the user's module; it owns every parameter and buffer.
        ranges: observers and scales of every edge.
        simulation: runs the graphs' operators as the phase says.
        control: the phase, which is "off", "observe", "fake_quantize", "frozen" (ranges fixed) or "frozen_batch_norm"
            (and BatchNorm uses its running statistics), in the order of training; and whether ranges follow.
        varying: `(input, dimension)` whose size differed from the captured call in some call since.
        bias_corrections: operator to what is added to its folded bias, `(out_channels,)`.
        learned_steps: the weights' scales while they are trained; None where they follow from the weights.
        layers: operator to the layer that stands in for the module's own, where an accuracy algorithm changed it.
        channels: edge to how its values map on the grid, where they are not rounded as they are.
    """

    recipe: Recipe

    def __init__(self, root: nn.Module, analysis: Analysis, recipe: Recipe, observer: str) -> None:
        self.root, self.plan, self.recipe = root, analysis.plan, recipe
        self.captured = analysis.captured
        self.islands: dict[str, Island] = {island.path: island for island in analysis.islands}
        self.operators: dict[str, Operator] = {}
        # Operator to the edges that it reads and to what it writes.
        self.reads: dict[str, tuple[str, ...]] = {}
        self.writes: dict[str, str] = {}
        edges: dict[str, Edge] = {}
        for path, island in self.islands.items():
            edges.update({identify(path, edge.key): edge for edge in island.plan.edges})
            for operator in island.plan.operators:
                identity = identify(path, operator.key)
                self.operators[identity], self.writes[identity] = operator, identify(path, operator.output)
                self.reads[identity] = tuple(identify(path, key) for key in operator.inputs)
        self.observer = observer
        self.weight_quant_maxima = override_weights(recipe, self.operators, analysis)
        self.ranges = Ranges(edges, recipe, observer)
        self.control = Control()
        # What runs in deep copies of the routed module: target networks, teachers.
        self._twins: weakref.WeakSet[Prepared] = weakref.WeakSet()
        self._is_twin = False
        self.varying: set[tuple[str, int]] = set()
        self.bias_corrections: dict[str, Tensor] = {}
        self.layers: dict[str, Layer] = {}
        self.channels: dict[str, ChannelScale] = {}
        self.learned_steps: LearnedSteps | None = None
        self._stored: dict[str, nn.Module] | None = None
        self.left = left_in_float(root, analysis.plan)
        # Float layers whose places stored ones have taken; graphs are traced with them.
        self.displaced: dict[str, nn.Module] = {}
        self.simulation = Simulation(self)
        self._runner = Runner(self)

    def __getstate__(self) -> dict[str, Any]:
        # What is made again when it is needed; weak references cannot be pickled.
        return {name: value for name, value in self.__dict__.items() if name not in ("_runner", "_twins", "_stored")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _twins=weakref.WeakSet(), _stored=None)
        self._runner = Runner(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Prepared":
        """Return what a copy of the routed module runs: the same ranges, in the same phase, moving none of them."""
        twin = memo[id(self)] = self.bound_to(self.root)
        twin.root = copied(self.root, memo)
        twin.control, twin._is_twin = self.control, True
        # A copy made in the middle of a block rounds what the block rounds, and has stored layers where it has them.
        twin.simulation.only, twin.displaced = self.simulation.only, dict(self.displaced)
        self._twins.add(twin)
        return twin

    @classmethod
    def of(cls, model: PlannedModel) -> Self:
        """Return a model as what it is, where only a recipe with a graph can have led.

        Raises:
            QuantizationError: it is of a recipe of layers.
        """
        if not isinstance(model, cls):
            raise QuantizationError(f"Expected `recipe` to be one with a graph, but got {model.recipe.name!r}.")
        return model

    @property
    def phase(self) -> str:
        """The present phase."""
        return self.control.phase

    @property
    def observing(self) -> bool:
        """Whether tensors that pass update the ranges now, in phases that have not frozen them."""
        return self.control.observing and not self._is_twin

    @observing.setter
    def observing(self, value: bool) -> None:
        self.control.observing = value

    @property
    def is_attached(self) -> bool:
        """Whether the module's forward, or those of its islands, are routed."""
        return all(self._is_routed(path) for path in self.islands)

    def attach(self) -> None:
        """Route the module's forward, or those of its islands, to the prepared graphs."""
        for path in self.islands:
            route(resolve(self.root, path), RoutedForward(self, path))

    def detach(self) -> None:
        """Give every routed module, and copies made of it meanwhile, their own forward back; safe to call twice."""
        for twin in self._twins:
            twin.detach()
        for path in self.islands:
            if self._is_routed(path):
                unroute(resolve(self.root, path))

    def _is_routed(self, path: str) -> bool:
        present = resolve(self.root, path).__dict__.get("forward")
        return isinstance(present, RoutedForward) and present.prepared is self

    @contextmanager
    def attached(self, phase: str = "frozen", *, observing: bool = False) -> Iterator[None]:
        """Route while a block runs, in a phase of its own."""
        stored = self.stored_layers() if phase == "frozen" and self.simulation.only is None else {}
        before, self.control = self.control, Control(observing=observing)
        try:
            self.set_phase(phase)
            self.attach()
            with placed(self.root, stored) as self.displaced:
                yield
        finally:
            self.displaced = {}
            self.detach()
            self.control = before

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
    def adjusted(self) -> bool:
        """Whether calibration changed biases or layers, which only the integer computation knows of."""
        return bool(self.bias_corrections or self.layers)

    def bound_to(self, root: nn.Module, tensors: list[Tensor] | None = None) -> Self:
        """Return the same plan and ranges over another module of the same structure, and another captured call."""
        other = copy.copy(self)
        other.root = root
        other.captured = self.captured if tensors is None else replace(self.captured, tensors=tensors)
        other.control, other._twins, other._is_twin = Control(), weakref.WeakSet(), False
        other.simulation, other._runner = Simulation(other), Runner(other)
        other._stored, other.displaced = None, {}
        return other

    def stored_layers(self) -> dict[str, nn.Module]:
        """Return the layers whose weights overrides leave to recipes of layers, made the first time they are needed."""
        if self._stored is None:
            stored, self.plan = store_layers(self, self.recipe, self.plan, self.left)
            # They are made on the CPU, and run beside the module's own layers.
            self._stored = self.beside(stored)
        return self._stored

    def beside(self, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Return layers on the module's device: copies, where they are elsewhere."""
        device = device_of(self.root)
        return {
            n: layer if device_of(layer) == device else copied_to(layer, device, in_float32=False)
            for n, layer in layers.items()
        }

    def planned(self) -> Plan:
        """Return the plan, with what overrides leave to recipes of layers."""
        self.stored_layers()
        return self.plan

    def on_host(self) -> Self:
        """Return the same over a float32 module on the CPU, where it is converted and measured: itself if it is so."""
        root = on_host(self.root)
        self.to(HOST)
        return self if root is self.root else self.bound_to(root)

    def to(self, device: torch.device) -> None:
        """Move what was learned to a device; other bindings of the plan share it, and fetch it when they run."""
        self.ranges.to(device)
        learned: Any
        # In place: bindings hold the same dicts.
        for learned in (self.bias_corrections, self.channels, self.layers):
            learned.update({identity: value.to(device) for identity, value in learned.items()})
        if self.learned_steps is not None:
            self.learned_steps.to(device)

    def take_over(self, other: "Prepared") -> None:
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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state; may be called more than once.

        Raises:
            QuantizationError: the state belongs to another model.
        """
        self.ranges.load_state_dict(state["observers"])
        device = device_of(self.root)
        self.bias_corrections.clear()
        self.bias_corrections.update(state["bias_corrections"])
        if self.learned_steps is not None and "learned_steps" in state:
            self.learned_steps.load_state_dict(state["learned_steps"], device)
        self.to(device)
        self.set_phase(state["phase"])

    def run(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an island's graph on a call."""
        return self._runner.run(path, args, kwargs)

    def is_traceable(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether compilers can look into the graph that runs on a call."""
        return self._runner.is_traceable(path, args, kwargs)

    def graph(self, path: str, spec: CallSpec, tensors: list[Tensor]) -> Instrumented:
        """Return the graph that runs an island on calls of this structure under the module's present flags."""
        return self._runner.graph(path, spec, tensors)

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
        operator, path = self.operators[identity], path_of(identity)
        input_scale, _ = self.ranges.parameters(self.reads[identity][0])
        quant_max = self.weight_quant_max(identity)
        if identity in self.layers:
            folded = fold_adjusted(self.layers[identity], input_scale, quant_max)
        else:
            weight = self.weight(identity) if weight is None else weight
            step = None
            if self.learned_steps is not None:
                step = self.learned_steps.step_of(identity, weight, quant_max).detach()
            bias = self._tensor(path, operator.bias) if operator.bias else None
            norm = statistics(resolve(self.root, path), operator.norm)
            folded = fold(weight, bias, norm, input_scale, quant_max, step)
        correction = self.bias_corrections.get(identity) if corrected else None
        return folded if correction is None else replace(folded, bias=folded.bias + correction.to(folded.bias))

    def weight(self, identity: str) -> Tensor:
        """Return the weight that `folded` belongs to: the module's own, or that of the layer in its place."""
        if identity in self.layers:
            return self.layers[identity].weight
        return self._tensor(path_of(identity), self.operators[identity].weight)

    def computes_weight(self, identity: str) -> bool:
        """Tell whether forward computes an operator's weight from parameters."""
        return self.operators[identity].weight in self.islands[path_of(identity)].constants

    def _tensor(self, path: str, name: str) -> Tensor:
        """Return a weight or bias of a graph's module, or what its forward computes as that."""
        module = resolve(self.root, path)
        computed = self.islands[path].constants.get(name)
        if computed is None:
            return fetch(module, name)
        with torch.no_grad(), evaluation_mode(module):
            return computed(module)

    def weight_integers(self, identity: str, folded: Folded) -> Tensor:
        """Return a weight in whole steps of its scale, float32."""
        layer = self.layers.get(identity)
        if layer is not None and layer.integers is not None:
            return layer.integers
        return folded.integers(self.weight(identity), self.weight_quant_max(identity))

    def weight_quant_max(self, identity: str) -> int:
        """Return the highest integer of an operator's weight, after overrides."""
        return self.weight_quant_maxima.get(identity, self.recipe.weight_grid.high)

    @torch.no_grad()
    def correct_biases(self, means: InputMeans) -> None:
        """Correct every bias for the rounding of its weights, from the means of what the operators read."""
        self.bias_corrections.clear()
        for identity, mean in means.means.items():
            folded = self.folded(identity)
            self.bias_corrections[identity] = bias_correction(
                self.weight(identity), folded, self.weight_integers(identity, folded), mean
            )
