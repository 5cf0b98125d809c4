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
from lightning_quant.bias_correction import InputMeans, bias_correction
from lightning_quant.calls import flatten_call
from lightning_quant.captured import CapturedModel
from lightning_quant.compilation import kept_from_compilers
from lightning_quant.errors import PlanError, QuantizationError
from lightning_quant.fake_quantize import fake_quantize, fake_quantize_weight
from lightning_quant.folding import Folded, fold_at
from lightning_quant.graph.analyze import Analysis, Island, analyze
from lightning_quant.graph.instrument import Instrumented, instrument
from lightning_quant.graph.plan import Edge, Operator, identify, path_of
from lightning_quant.graph.table import Selection
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
        self.ranges = Ranges(edges, recipe, observer)
        self.control = Control()
        # What runs in deep copies of the routed module: target networks, teachers.
        self._twins: weakref.WeakSet[Prepared] = weakref.WeakSet()
        self._is_twin = False
        self.varying: set[tuple[str, int]] = set()
        self.recorded: list[tuple[str, Tensor]] | None = None
        self.input_means: InputMeans | None = None
        self.bias_corrections: dict[str, Tensor] = {}
        self._graphs: dict[Any, Instrumented] = {}
        # Edge to the integers, without zero point and not clipped, that its producer has just computed for it.
        self._integers: dict[str, Tensor] = {}

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
        before, self.control = self.control, Control(observing=observing)
        try:
            self.set_phase(phase)
            self.attach()
            yield
        finally:
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
    def computes_integers(self) -> bool:
        """Whether operators compute what integer kernels do: in evaluation, without gradients or after calibration."""
        in_evaluation = not self.root.training and (not torch.is_grad_enabled() or bool(self.bias_corrections))
        return self.quantizes and in_evaluation

    def bound_to(self, root: nn.Module, tensors: list[Tensor] | None = None) -> "Prepared":
        """Return the same plan and ranges over another module of the same structure, and another captured call."""
        other = copy.copy(self)
        other.root = root
        other.tensors = self.tensors if tensors is None else tensors
        other.control, other._twins, other._is_twin = Control(), weakref.WeakSet(), False
        other._graphs, other._integers = {}, {}
        return other

    def state_dict(self) -> dict[str, Any]:
        """Return phase and ranges: tensors, numbers, strings and dicts only."""
        return {
            "phase": self.phase,
            "observers": self.ranges.state_dict(),
            "bias_corrections": dict(self.bias_corrections),
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
        self.set_phase(state["phase"])

    # --- running, called from the graphs

    def run(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an island's graph on a call."""
        island = self.islands[path]
        module = resolve(self.root, path)
        spec, tensors = flatten_call(island.signature, args, kwargs)
        key = (path, spec.key(), tuple(child.training for child in module.modules()))
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = instrument(module, island, spec, tensors)
        if not path:
            self._note_sizes(spec.names, tensors)
        return graph.output_spec.build(graph.function(module, self, *tensors))

    def quantize_edge(self, identity: str, x: Tensor) -> Tensor:
        """Observe and round one tensor, as the phase says."""
        if self.observing and self.phase in ("observe", "fake_quantize"):
            self.ranges.observe(identity, x)
        if not self.quantizes:
            return x
        scale, zero_point = self.ranges.parameters(identity)
        quant_max, integers = self.recipe.activation.quant_max, self._integers.pop(identity, None)
        if integers is None:
            rounded = fake_quantize(x, scale, zero_point, quant_max)
        else:
            rounded = (integers.clamp(-zero_point.item(), quant_max - zero_point.item()) * scale).to(x.dtype)
        if self.recorded is not None:
            integers = torch.round(rounded.detach().float() / scale + zero_point)
            self.recorded.append((identity, integers.to(torch.uint8)))
        return rounded

    def folded(self, identity: str) -> Folded:
        """Return bias and scales of a weighted operator as they are exported; the same in training and in convert."""
        operator, path = self.operators[identity], path_of(identity)
        input_scale, _ = self.ranges.parameters(identify(path, operator.inputs[0]))
        names = (operator.weight, operator.bias, operator.batch_norm.partition("#")[0])
        folded = fold_at(resolve(self.root, path), names, input_scale, self.recipe.weight.quant_max)
        correction = self.bias_corrections.get(identity)
        return folded if correction is None else replace(folded, bias=folded.bias + correction.to(folded.bias))

    @torch.no_grad()
    def correct_biases(self, means: InputMeans) -> None:
        """Correct every bias for the rounding of its weights, from the means of what the operators read."""
        self.bias_corrections.clear()
        for identity, mean in means.means.items():
            weight = fetch(resolve(self.root, path_of(identity)), self.operators[identity].weight)
            correction = bias_correction(weight, self.folded(identity), mean, self.recipe.weight.quant_max)
            self.bias_corrections[identity] = correction

    def run_layer(self, identity: str, layer: nn.Module, x: Tensor) -> Tensor:
        """Call a layer, hooks and all, with a rounded weight in place of its own."""
        if not self.quantizes:
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
        if not self.quantizes:
            self._note_input(identity, x)
            return function(x, weight, bias, *args, **kwargs)
        return self._run_weighted(identity, x, weight, bias, lambda x, w, b: function(x, w, b, *args, **kwargs))

    def _run_weighted(
        self, identity: str, x: Tensor, weight: Tensor, bias: Tensor | None, call: Callable[..., Tensor]
    ) -> Tensor:
        folded = self.folded(identity)
        if not self.computes_integers:
            return call(x, fake_quantize_weight(weight, folded.unfolded_scale), bias)
        operator, path = self.operators[identity], path_of(identity)
        input_scale, _ = self.ranges.parameters(identify(path, operator.inputs[0]))
        integers = folded.integers(weight, self.recipe.weight.quant_max)
        with torch.autocast(x.device.type, enabled=False):
            sums = call(torch.round(x.float() / input_scale), integers, None)
        shape = (-1,) if operator.kind == "linear" else (-1, *[1] * (sums.dim() - 2))
        sums, step = sums + folded.bias_integers.view(shape), folded.bias_step.view(shape)
        if operator.quantized_output:
            output = identify(path, operator.output)
            self._integers[output] = integer.requantize(sums, step, self.ranges.parameters(output)[0])
        return (sums * step).to(x.dtype)

    def run_add(self, identity: str, first: Tensor, second: Tensor) -> Tensor:
        """Add two quantized tensors."""
        operator, path = self.operators[identity], path_of(identity)
        rounded = all(identify(path, key) in self.ranges.edges for key in operator.inputs)
        if self.computes_integers and operator.quantized_output and rounded:
            output = identify(path, operator.output)
            one, other = (self.ranges.parameters(identify(path, key)) for key in operator.inputs)
            self._integers[output] = integer.add(first, second, (one, other), self.ranges.parameters(output))
        return first + second

    def run_batch_norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Call a BatchNorm that is fused into the layer before it, unless that one computed it in integers already."""
        if self.computes_integers:
            return x
        if self.phase != "frozen_batch_norm":
            return norm(x)
        mean, variance = fetch(norm, "running_mean"), fetch(norm, "running_var")
        return F.batch_norm(x, mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)  # type: ignore[arg-type]

    def _note_input(self, identity: str, x: Tensor) -> None:
        if self.observing and self.input_means is not None:
            self.input_means.update(identity, self.operators[identity].kind, x)


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
    analysis = analyze(
        model,
        args,
        kwargs or {},
        table,
        selection or Selection(),
        recipe=chosen.name,
        runtime=runtime,
        module=module,
    )
    return Prepared(model, analysis, chosen, observer or chosen.training_observer)
