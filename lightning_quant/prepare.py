"""Stage 3: run a module with fake quantization, without touching its type, parameters or `state_dict`.

Only `forward` of the module (or of its islands) is routed to a graph that calls the user's own submodules by path.
Observers and ranges are plain tensors outside the module.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_quant import integer, runtimes
from lightning_quant import recipe as recipes
from lightning_quant.adjustments import AccuracyStep, ChannelScale, Layer
from lightning_quant.bias_correction import InputMeans, bias_correction
from lightning_quant.calls import CallSpec, flatten_call
from lightning_quant.captured import CapturedModel
from lightning_quant.compilation import kept_from_compilers
from lightning_quant.errors import PlanError, QuantizationError
from lightning_quant.fake_quantize import fake_quantize, fake_quantize_weight
from lightning_quant.folding import Folded, fold_adjusted, fold_at
from lightning_quant.graph.analyze import Analysis, Island, analyze
from lightning_quant.graph.instrument import Instrumented, instrument
from lightning_quant.graph.plan import Edge, Operator, Plan, identify, path_of
from lightning_quant.graph.table import Selection
from lightning_quant.layers.placement import placed
from lightning_quant.learned_steps import LearnedSteps, quantize_with_learned_step
from lightning_quant.overrides import override_weights, select, store_layers
from lightning_quant.ranges import Ranges
from lightning_quant.recipe import Recipe
from lightning_quant.routing import Route, device_of, fetch, resolve, route, shadowed, unparametrized, unroute

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
        return self._run(self.path, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoutedForward":
        return RoutedForward(copy.deepcopy(self.prepared, memo), self.path)


class Prepared(CapturedModel):
    """A module, its plan, and the state of its quantizers.

    Attributes:
        root: the user's module; it owns every parameter and buffer.
        signature: of the module's own forward; with `spec` and `tensors` it is the captured call.
        ranges: observers and scales of every edge.
        control: the phase, which is "off", "observe", "fake_quantize", "frozen" (ranges fixed) or "frozen_batch_norm"
            (and BatchNorm uses its running statistics), in the order of training; and whether ranges follow.
        varying: `(input, dimension)` whose size differed from the captured call in some call since.
        input_means: when set, gets the means of what weighted operators read while observing.
        bias_corrections: operator to what is added to its folded bias, `(out_channels,)`.
        learned_steps: the weights' scales while they are trained; None where they follow from the weights.
        layers: operator to the layer that stands in for the module's own, where an accuracy algorithm changed it.
        channels: edge to how its values map on the grid, where they are not rounded as they are.
        accuracy_steps: what was tried for accuracy, and what came of it.
        only: when set, the weighted operators and edges that are rounded; all others compute in float.
        watcher: when set, gets every edge's identity and float values while nothing is rounded.
        recorded: when a list, every tensor that is rounded is appended to it as `(edge, integers)`.
    """

    def __init__(self, root: nn.Module, analysis: Analysis, recipe: Recipe, observer: str) -> None:
        self.root, self.plan, self.recipe = root, analysis.plan, recipe
        self.signature, self.spec, self.tensors = analysis.signature, analysis.spec, analysis.tensors
        self.islands: dict[str, Island] = {island.path: island for island in analysis.islands}
        self.operators: dict[str, Operator] = {}
        edges: dict[str, Edge] = {}
        for path, island in self.islands.items():
            edges.update({identify(path, edge.key): edge for edge in island.plan.edges})
            self.operators.update({identify(path, operator.key): operator for operator in island.plan.operators})
        self.observer = observer
        self.weight_quant_maxima = override_weights(recipe, self.operators, analysis)
        self.ranges = Ranges(edges, recipe, observer)
        self.control = Control()
        # What runs in deep copies of the routed module: target networks, teachers.
        self._twins: weakref.WeakSet[Prepared] = weakref.WeakSet()
        self._is_twin = False
        self.varying: set[tuple[str, int]] = set()
        self.recorded: list[tuple[str, Tensor]] | None = None
        self.input_means: InputMeans | None = None
        self.bias_corrections: dict[str, Tensor] = {}
        self.layers: dict[str, Layer] = {}
        self.channels: dict[str, ChannelScale] = {}
        self.accuracy_steps: tuple[AccuracyStep, ...] = ()
        self.learned_steps: LearnedSteps | None = None
        self.only: frozenset[str] | None = None
        self.watcher: Callable[[str, Tensor], None] | None = None
        # Results that have their BatchNorm folded in already, until it is its turn.
        self._normalized: list[Tensor] = []
        self._graphs: dict[Any, Instrumented] = {}
        # Edge to the integers, without zero point and not clipped, that its producer has just computed for it.
        self._integers: dict[str, Tensor] = {}
        self._stored: dict[str, nn.Module] | None = None
        # Float layers whose places stored ones have taken; graphs are traced with them.
        self._displaced: dict[str, nn.Module] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": {}, "_twins": weakref.WeakSet()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Prepared":
        """Return what a copy of the routed module runs: the same ranges, in the same phase, moving none of them."""
        twin = memo[id(self)] = self.bound_to(self.root)
        twin.root = copy.deepcopy(self.root, memo)
        twin.control, twin._is_twin = self.control, True
        self._twins.add(twin)
        return twin

    # --- control

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
    def attached(self, phase: str, *, observing: bool = False) -> Iterator[None]:
        """Route for the time of a block, in a phase of its own."""
        stored = self.stored_layers() if phase == "frozen" and self.only is None else {}
        before, self.control = self.control, Control(observing=observing)
        try:
            self.set_phase(phase)
            self.attach()
            with placed(self.root, stored) as self._displaced:
                yield
        finally:
            self._displaced = {}
            self.detach()
            self.control = before

    @contextmanager
    def recording(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Record the integers of every quantized tensor, in the order of execution."""
        self.recorded = []
        try:
            yield self.recorded
        finally:
            self.recorded = None

    @contextmanager
    def measuring(self, means: InputMeans | None) -> Iterator[None]:
        """Let observed calls also count for the means of what weighted operators read."""
        self.input_means = means
        try:
            yield
        finally:
            self.input_means = None

    @contextmanager
    def watching(self, watcher: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Show the float values of every edge to a function."""
        self.watcher = watcher
        try:
            yield
        finally:
            self.watcher = None

    @contextmanager
    def quantizing_only(self, identities: frozenset[str]) -> Iterator[None]:
        """Round the weights of these operators and the values of these edges alone."""
        self.only = identities
        try:
            yield
        finally:
            self.only = None
            self._normalized.clear()

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

    def rounds(self, identity: str) -> bool:
        """Tell whether an operator's weight or an edge is rounded now."""
        return self.quantizes and (self.only is None or identity in self.only)

    @property
    def adjusted(self) -> bool:
        """Whether calibration changed biases or layers, which only the integer computation knows of."""
        return bool(self.bias_corrections or self.layers)

    @property
    def computes_integers(self) -> bool:
        """Whether operators compute what integer kernels do: in evaluation, without gradients or after calibration."""
        in_evaluation = not self.root.training and (not torch.is_grad_enabled() or self.adjusted)
        return self.quantizes and in_evaluation and self.only is None

    def bound_to(self, root: nn.Module, tensors: list[Tensor] | None = None) -> "Prepared":
        """Return the same plan and ranges over another module of the same structure, and another captured call."""
        other = copy.copy(self)
        other.root = root
        other.tensors = self.tensors if tensors is None else tensors
        other.control, other._twins, other._is_twin = Control(), weakref.WeakSet(), False
        other._graphs, other._integers, other._stored, other._displaced = {}, {}, None, {}
        return other

    def stored_layers(self) -> dict[str, nn.Module]:
        """Return the layers whose weights overrides leave to recipes of layers, made the first time they are needed."""
        if self._stored is None:
            self._stored, self.plan = store_layers(self, self.recipe, self.plan)
        return self._stored

    def planned(self) -> Plan:
        """Return the plan, with what overrides leave to recipes of layers."""
        self.stored_layers()
        return self.plan

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
        """Take over a saved state; may be called more than once.

        Raises:
            QuantizationError: the state belongs to another model.
        """
        self.ranges.load_state_dict(state["observers"])
        device = device_of(self.root)
        self.ranges.to(device)
        corrections = {identity: value.to(device) for identity, value in state["bias_corrections"].items()}
        self.bias_corrections.clear()
        self.bias_corrections.update(corrections)
        if self.learned_steps is not None and "learned_steps" in state:
            self.learned_steps.load_state_dict(state["learned_steps"], device)
        self.set_phase(state["phase"])

    # --- running, called from the graphs

    def run(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an island's graph on a call."""
        island = self.islands[path]
        spec, tensors = flatten_call(island.signature, args, kwargs)
        graph = self.graph(path, spec, tensors)
        if not path:
            self._note_sizes(spec.names, tensors)
        return graph.output_spec.build(graph.function(resolve(self.root, path), self, *tensors))

    def graph(self, path: str, spec: CallSpec, tensors: list[Tensor]) -> Instrumented:
        """Return the graph that runs an island on calls of this structure under the module's present flags."""
        module = resolve(self.root, path)
        key = (path, spec.key(), tuple(child.training for child in module.modules()))
        if key not in self._graphs:
            with placed(self.root, self._displaced):
                self._graphs[key] = instrument(module, self.islands[path], spec, tensors)
        return self._graphs[key]

    def quantize_edge(self, identity: str, x: Tensor) -> Tensor:
        """Observe and round one tensor, as the phase says."""
        if self.observing and self.phase in ("observe", "fake_quantize"):
            self.ranges.observe(identity, self.on_grid(identity, x, clipped=True))
        if self.watcher is not None:
            self.watcher(identity, x)
        if not self.rounds(identity):
            return x
        scale, zero_point = self.ranges.parameters(identity)
        quant_max, integers = self.recipe.activation.quant_max, self._integers.pop(identity, None)
        if integers is None:
            rounded = fake_quantize(self.on_grid(identity, x), scale, zero_point, quant_max)
        else:
            rounded = (integers.clamp(-zero_point.item(), quant_max - zero_point.item()) * scale).to(x.dtype)
        if self.recorded is not None:
            integers = torch.round(rounded.detach().float() / scale + zero_point)
            self.recorded.append((identity, integers.to(torch.uint8)))
        channels = self.channels.get(identity)
        return rounded if channels is None else channels.from_grid(rounded)

    def on_grid(self, identity: str, x: Tensor, *, clipped: bool = False) -> Tensor:
        """Map values of an edge to those that are rounded, if wanted with the clip that the grid's end carries out."""
        channels = self.channels.get(identity)
        if channels is None:
            return x
        return channels.to_grid(x).clamp(max=channels.clip) if clipped else channels.to_grid(x)

    def folded(self, identity: str, *, corrected: bool = True) -> Folded:
        """Return bias and scales of a weighted operator as they are exported; the same in training and in convert."""
        operator, path = self.operators[identity], path_of(identity)
        input_scale, _ = self.ranges.parameters(identify(path, operator.inputs[0]))
        quant_max = self.weight_quant_max(identity)
        if identity in self.layers:
            folded = fold_adjusted(self.layers[identity], input_scale, quant_max)
        else:
            names = (operator.weight, operator.bias, operator.batch_norm.partition("#")[0])
            step = None
            if self.learned_steps is not None:
                step = self.learned_steps.step_of(identity, self.weight(identity), quant_max).detach()
            folded = fold_at(resolve(self.root, path), names, input_scale, quant_max, step)
        correction = self.bias_corrections.get(identity) if corrected else None
        return folded if correction is None else replace(folded, bias=folded.bias + correction.to(folded.bias))

    def weight(self, identity: str) -> Tensor:
        """Return the weight that `folded` belongs to: the module's own, or that of the layer in its place."""
        if identity in self.layers:
            return self.layers[identity].weight
        return fetch(resolve(self.root, path_of(identity)), self.operators[identity].weight)

    def weight_integers(self, identity: str, folded: Folded) -> Tensor:
        """Return a weight in whole steps of its scale, float32."""
        layer = self.layers.get(identity)
        if layer is not None and layer.integers is not None:
            return layer.integers
        return folded.integers(self.weight(identity), self.weight_quant_max(identity))

    def weight_quant_max(self, identity: str) -> int:
        """Return the highest integer of an operator's weight, after overrides."""
        return self.weight_quant_maxima.get(identity, self.recipe.weight.quant_max)

    @torch.no_grad()
    def correct_biases(self, means: InputMeans) -> None:
        """Correct every bias for the rounding of its weights, from the means of what the operators read."""
        self.bias_corrections.clear()
        for identity, mean in means.means.items():
            folded = self.folded(identity)
            self.bias_corrections[identity] = bias_correction(
                self.weight(identity), folded, self.weight_integers(identity, folded), mean
            )

    def run_layer(self, identity: str, layer: nn.Module, x: Tensor) -> Tensor:
        """Call a layer, hooks and all, with a rounded weight in place of its own."""
        if not self.rounds(identity):
            self._note_input(identity, x)
            return layer(x)

        def forward(x: Tensor) -> Tensor:
            def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                with shadowed(layer, {"weight": weight, "bias": bias}), unparametrized(layer):
                    return type(layer).forward(layer, x)

            # Weights are read here, after hooks such as pruning have set them.
            bias = fetch(layer, "bias") if layer.bias is not None else None
            return self._run_weighted(identity, x, fetch(layer, "weight"), bias, call)

        # Cached: a parametrization may change with every look at the weight, as spectral norm does.
        with shadowed(layer, {"forward": forward}), parametrize.cached():
            return layer(x)

    def run_function(
        self, identity: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Call a functional layer with a rounded weight."""
        function = getattr(F, self.operators[identity].kind)
        if not self.rounds(identity):
            self._note_input(identity, x)
            return function(x, weight, bias, *args, **kwargs)
        return self._run_weighted(identity, x, weight, bias, lambda x, w, b: function(x, w, b, *args, **kwargs))

    def _run_weighted(
        self, identity: str, x: Tensor, weight: Tensor, bias: Tensor | None, call: Callable[..., Tensor]
    ) -> Tensor:
        folded = self.folded(identity)
        if self.only is not None:
            return self._run_alone(identity, folded, x, call)
        if not self.computes_integers:
            return call(x, self._rounded_weight(identity, weight, folded), bias)
        operator, path = self.operators[identity], path_of(identity)
        input_scale, _ = self.ranges.parameters(identify(path, operator.inputs[0]))
        integers = self.weight_integers(identity, folded)
        on_grid = self.on_grid(identify(path, operator.inputs[0]), x.float())
        with torch.autocast(x.device.type, enabled=False):
            sums = call(torch.round(on_grid / input_scale), integers, None)
        shape = (-1,) if operator.kind == "linear" else (-1, *[1] * (sums.dim() - 2))
        sums, step = sums + folded.bias_integers.view(shape), folded.bias_step.view(shape)
        if operator.quantized_output:
            output = identify(path, operator.output)
            self._integers[output] = integer.requantize(sums, step, self.ranges.parameters(output)[0])
        return (sums * step).to(x.dtype)

    def _rounded_weight(self, identity: str, weight: Tensor, folded: Folded) -> Tensor:
        if self.learned_steps is None:
            return fake_quantize_weight(weight, folded.unfolded_scale)
        quant_max = self.weight_quant_max(identity)
        step = self.learned_steps.step_of(identity, weight, quant_max)
        # A scale that was stretched for the sake of the bias is not the learned one, and passes no gradient to it.
        step = torch.where(folded.unfolded_scale > step * 1.0001, folded.unfolded_scale, step)
        return quantize_with_learned_step(weight, step, quant_max)

    def _run_alone(self, identity: str, folded: Folded, x: Tensor, call: Callable[..., Tensor]) -> Tensor:
        """Compute a layer with a rounded weight among others that stay float."""
        operator, path = self.operators[identity], path_of(identity)
        integers = self.weight_integers(identity, folded)
        weight = integers * folded.scale.view(-1, *[1] * (integers.dim() - 1))
        y = call(self.on_grid(identify(path, operator.inputs[0]), x.float()), weight, None)
        y = y + folded.bias.view((-1,) if operator.kind == "linear" else (-1, *[1] * (y.dim() - 2)))
        channels = self.channels.get(identify(path, operator.output))
        y = (y if channels is None else channels.from_grid(y)).to(x.dtype)
        if operator.batch_norm:
            self._normalized.append(y)
        return y

    def run_add(self, identity: str, first: Tensor, second: Tensor) -> Tensor:
        """Add two quantized tensors."""
        operator, path = self.operators[identity], path_of(identity)
        rounded = all(identify(path, key) in self.ranges.edges for key in operator.inputs)
        if self.computes_integers and operator.quantized_output and rounded:
            output = identify(path, operator.output)
            edges = [identify(path, key) for key in operator.inputs]
            one, other = (self.ranges.parameters(edge) for edge in edges)
            operands = self.on_grid(edges[0], first), self.on_grid(edges[1], second)
            self._integers[output] = integer.add(*operands, (one, other), self.ranges.parameters(output))
        return first + second

    def run_batch_norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Call a BatchNorm that is fused into the layer before it, unless that one computed it in integers already."""
        if self.computes_integers or any(x is normalized for normalized in self._normalized):
            return x
        if self.phase != "frozen_batch_norm":
            return norm(x)
        mean, variance = fetch(norm, "running_mean"), fetch(norm, "running_var")
        return F.batch_norm(x, mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)  # type: ignore[arg-type]

    def _note_input(self, identity: str, x: Tensor) -> None:
        if self.observing and self.input_means is not None:
            operator = self.operators[identity]
            x = self.on_grid(identify(path_of(identity), operator.inputs[0]), x)
            self.input_means.update(identity, operator.kind, x)


def prepare(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    recipe: str | Recipe = "int8",
    runtime: str = "onnxruntime",
    selection: Selection | None = None,
    observer: str | None = None,
    module: str = "",
) -> Prepared:
    """Plan a module from one call and return it ready to be attached; the module is left as it was.

    Args:
        model: the float module.
        args: positional arguments of one real call.
        kwargs: keyword arguments of the same call.
        recipe: numerics, by name or object.
        runtime: name of the runtime whose operator table counts.
        selection: patterns of operators to include and exclude.
        observer: name of the observer; the recipe's training observer by default.
        module: the module's qualified name, for the plan.

    Raises:
        PlanError: nothing can be quantized.
    """
    chosen = recipes.get(recipe)
    if not isinstance(chosen, Recipe):
        raise PlanError(f"Expected `recipe` to quantize a graph, but {chosen.name!r} quantizes layers without one.")
    table = runtimes.get(runtime, exporting=True).TABLE
    if table is None:
        raise PlanError(
            f"Expected `runtime` to have integer kernels for recipe {chosen.name!r}, but {runtime!r} has none. It runs "
            f"{sorted(name for name, known in recipes.RECIPES.items() if not isinstance(known, Recipe))}."
        )
    selection = select(selection or Selection(), chosen)
    analysis = analyze(
        model,
        args,
        kwargs or {},
        table,
        selection,
        recipe=chosen.name,
        runtime=runtime,
        module=module,
    )
    prepared = Prepared(model, analysis, chosen, observer or chosen.training_observer)
    # What can be refused is refused now; the layers themselves are made of the weights that will be exported.
    prepared.plan = prepared.bound_to(model).planned()
    return prepared
