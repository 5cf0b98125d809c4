"""Stage 3: run a module with fake quantization, without touching its type, parameters or `state_dict`.

Only `forward` of the module (or of its islands) is routed to a graph that calls the user's own submodules by path.
Observers and ranges are plain tensors outside the module.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from lightning_quant import observers, runtimes
from lightning_quant import recipe as recipes
from lightning_quant.calls import ResultSpec, flatten_call, rebuild_call
from lightning_quant.errors import CalibrationError, QuantizationError
from lightning_quant.fake_quantize import (
    BIAS_LIMIT,
    SMALLEST_SCALE,
    affine_parameters,
    channel_maximum,
    fake_quantize,
    fake_quantize_weight,
    weight_scale,
)
from lightning_quant.graph.analyze import Analysis, Island, analyze
from lightning_quant.graph.operations import argument
from lightning_quant.graph.patterns import Selection
from lightning_quant.graph.plan import Edge, Operator
from lightning_quant.graph.trace import trace
from lightning_quant.recipe import Recipe
from lightning_quant.routing import device_of, resolve, route, unroute

PHASES = ("off", "observe", "fake_quantize", "frozen", "frozen_batch_norm")


@dataclass(frozen=True)
class _Compiled:
    function: Callable[..., Any]
    output_spec: ResultSpec


class RoutedForward:
    """What stands in a module's `__dict__` as `forward`; a deepcopy of the module gets its own."""

    def __init__(self, prepared: "Prepared", path: str) -> None:
        self.prepared, self.path = prepared, path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.prepared.run(self.path, args, kwargs)


class Prepared:
    """A module, its plan, and the state of its quantizers.

    Attributes:
        root: the user's module; it owns every parameter and buffer.
        signature: of the module's own forward; with `spec` and `tensors` it is the captured call.
        phase: "off", "observe", "fake_quantize", "frozen" (ranges fixed) or "frozen_batch_norm" (and BatchNorm uses its
            running statistics), in the order of training.
        varying: `(input, dimension)` whose size differed from the captured call in some call since.
        recorded: when a list, every tensor that is rounded is appended to it as `(edge, integers)`.
        observing: whether tensors that pass update the ranges, in phases that have not frozen them.
    """

    def __init__(self, root: nn.Module, analysis: Analysis, recipe: Recipe, observer: str) -> None:
        self.root, self.plan, self.recipe = root, analysis.plan, recipe
        self.signature, self.spec, self.tensors = analysis.signature, analysis.spec, analysis.tensors
        self.islands: dict[str, Island] = {island.path: island for island in analysis.islands}
        self.phase = "off"
        self.observing = False
        self.edges: dict[str, Edge] = {}
        self.operators: dict[str, Operator] = {}
        for path, island in self.islands.items():
            self.edges.update({identify(path, edge.key): edge for edge in island.plan.edges})
            self.operators.update({identify(path, operator.key): operator for operator in island.plan.operators})
        self.observer_name = observer
        self.observers = {i: observers.build(observer, recipe) for i, edge in self.edges.items() if edge.observed}
        self._members: dict[str, list[str]] = {}
        for identity in self.observers:
            self._members.setdefault(self._group(identity), []).append(identity)
        self._parameters: dict[str, tuple[Tensor, Tensor]] = {}
        self._compiled: dict[Any, _Compiled] = {}
        self.recorded: list[tuple[str, Tensor]] | None = None
        self.varying: set[tuple[str, int]] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}}

    # --- control

    def attach(self) -> None:
        """Route the module's forward, or those of its islands, to the prepared graphs."""
        for path in self.islands:
            route(resolve(self.root, path), RoutedForward(self, path))

    def detach(self) -> None:
        """Give every routed module its own forward back; safe to call twice."""
        for path in self.islands:
            unroute(resolve(self.root, path))

    @contextmanager
    def recording(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Record the integers of every quantized tensor, in the order of execution."""
        self.recorded = []
        try:
            yield self.recorded
        finally:
            self.recorded = None

    @contextmanager
    def attached(self, phase: str, *, observing: bool = False) -> Iterator[None]:
        """Route for the time of a block, in a phase of its own."""
        before = self.phase, self.observing
        self.set_phase(phase)
        self.observing = observing
        self.attach()
        try:
            yield
        finally:
            self.detach()
            self.phase, self.observing = before

    def set_phase(self, phase: str) -> None:
        """Change the phase.

        Raises:
            QuantizationError: no phase has that name.
        """
        if phase not in PHASES:
            raise QuantizationError(f"Expected `phase` to be one of {PHASES}, but got {phase!r}.")
        self.phase = phase

    def call(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return args and kwargs of the captured call with these tensors in place of its own."""
        return rebuild_call(self.signature, self.spec.arguments(list(tensors)))

    @property
    def quantizes(self) -> bool:
        """Whether tensors are rounded in this phase."""
        return self.phase in PHASES[2:]

    def bound_to(self, root: nn.Module, tensors: list[Tensor] | None = None) -> "Prepared":
        """Return the same plan and observers over another module of the same structure, and another captured call."""
        other = copy.copy(self)
        other.root = root
        other.tensors = self.tensors if tensors is None else tensors
        other.phase, other.observing = "off", False
        other._parameters, other._compiled = {}, {}
        return other

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """Return the observers' state and the phase: tensors, numbers, strings and dicts only."""
        return {"phase": self.phase, "observers": {i: o.state() for i, o in self.observers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state; may be called more than once.

        Raises:
            QuantizationError: the state belongs to another model.
        """
        different = set(state["observers"]) ^ set(self.observers)
        if different:
            raise QuantizationError(
                f"Expected quantizer state of this model, but {sorted(different)[:3]} differ. Was the model or the recipe "
                "changed since the checkpoint? Start without the callback's state to observe anew."
            )
        device = device_of(self.root)
        for identity, saved in state["observers"].items():
            self.observers[identity].load_state(saved)
            self.observers[identity].to(device)
        self.forget_parameters()
        self.phase = state["phase"]

    def parameters_of(self, identity: str) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of an edge, both 0-dim float32.

        Raises:
            CalibrationError: the edge was never observed, or saw values that are not finite.
        """
        group = self._group(identity)
        if group not in self._parameters:
            lows, highs = zip(*[self._range(member) for member in self._members[group]], strict=True)
            low, high = torch.stack(lows).amin(), torch.stack(highs).amax()
            self._parameters[group] = affine_parameters(low, high, self.recipe.activation.quant_max)
        return self._parameters[group]

    def forget_parameters(self) -> None:
        """Drop scales that were computed from earlier ranges."""
        self._parameters = {}

    def check_observed(self) -> None:
        """Raise unless every edge has a finite range.

        Raises:
            CalibrationError: names the edges without one.
        """
        missing = [identity for identity, observer in self.observers.items() if observer.low is None]
        if missing:
            raise CalibrationError(
                f"Expected every quantized tensor to have been observed, but {', '.join(missing[:5])} "
                f"{'was' if len(missing) == 1 else 'were'} not. Train or calibrate with batches that reach it."
            )
        for identity in self.observers:
            low, high = self._range(identity)
            if not torch.isfinite(low + high):
                raise CalibrationError(f"Expected finite values at {identity}, but got the range [{low}, {high}].")

    def _range(self, identity: str) -> tuple[Tensor, Tensor]:
        try:
            return self.observers[identity].range()
        except CalibrationError as error:
            raise CalibrationError(f"{identity}: {error}") from error

    def _group(self, identity: str) -> str:
        path = identity.partition(":")[0]
        return identify(path, self.edges[identity].group)

    # --- running, called from the graphs

    def run(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an island's graph on a call."""
        island = self.islands[path]
        module = resolve(self.root, path)
        spec, tensors = flatten_call(island.signature, args, kwargs)
        key = (path, spec.key(), tuple(child.training for child in module.modules()))
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = _compile(module, island, spec, tensors)
        if not path:
            self._note_sizes(spec.names, tensors)
        leaves = compiled.function(module, self, *tensors)
        return compiled.output_spec.build(leaves)

    def _note_sizes(self, names: tuple[str, ...], tensors: list[Tensor]) -> None:
        for name, tensor, captured in zip(names, tensors, self.tensors, strict=False):
            if tensor.shape != captured.shape and tensor.dim() == captured.dim():
                self.varying.update((name, d) for d in range(tensor.dim()) if tensor.shape[d] != captured.shape[d])

    def quantize_edge(self, identity: str, x: Tensor) -> Tensor:
        """Observe and round one tensor, as the phase says."""
        if self.observing and self.phase in ("observe", "fake_quantize") and identity in self.observers:
            try:
                self.observers[identity].update(x)
            except CalibrationError as error:
                raise CalibrationError(f"Expected finite values at {identity}, but got {error}.") from error
            self._parameters.pop(self._group(identity), None)
        if not self.quantizes:
            return x
        scale, zero_point = self.parameters_of(identity)
        rounded = fake_quantize(x, scale, zero_point, self.recipe.activation.quant_max)
        if self.recorded is not None:
            self.recorded.append((identity, torch.round(rounded.detach().float() / scale + zero_point).to(torch.uint8)))
        return rounded

    def quantize_weight(self, identity: str, weight: Tensor) -> Tensor:
        """Round a weight for the input range and the BatchNorm that it meets."""
        if not self.quantizes:
            return weight
        scale = self.weight_scale(identity, weight)
        return fake_quantize_weight(weight, scale)

    def quantize_bias(self, identity: str, bias: Tensor) -> Tensor:
        """Round a bias to the steps of its int32 form; where a BatchNorm is fused, that one's bias is rounded instead."""
        if not self.quantizes or self.operators[identity].batch_norm:
            return bias
        return bias + self.bias_error(identity).to(bias.dtype)

    @torch.no_grad()
    def bias_error(self, identity: str) -> Tensor:
        """Return what rounding the folded bias to int32 adds to it, `(out_channels,)`."""
        _, bias, scale = self.folded_scales(identity)
        step = scale * self.input_scale(identity)
        return torch.round(bias / step) * step - bias

    @torch.no_grad()
    def weight_scale(self, identity: str, weight: Tensor) -> Tensor:
        """Return the scale of each channel before folding, `(out_channels,)`; the same in training and in convert."""
        gain, bias = self.folding(identity)
        input_scale = self.input_scale(identity)
        quant_max = self.recipe.weight.quant_max
        return weight_scale(channel_maximum(weight), quant_max, gain=gain, bias=bias, input_scale=input_scale)

    @torch.no_grad()
    def folded_scales(self, identity: str) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return gain, bias and weight scale of each channel after folding, `(out_channels,)` float32 each."""
        weight = fetch(resolve(self.root, identity.partition(":")[0]), self.operators[identity].weight)
        gain, bias = self.folding(identity)
        scale = self.weight_scale(identity, weight)  # type: ignore[arg-type]
        scale = scale if gain is None else scale * gain.abs()
        bias = torch.zeros_like(scale) if bias is None else bias.float()
        # Where the gain is zero so is the scale; the bias still needs a step that int32 can count.
        smallest = (bias.abs() / (self.input_scale(identity) * BIAS_LIMIT)).clamp(min=SMALLEST_SCALE)
        return gain, bias, torch.maximum(scale, smallest)

    def input_scale(self, identity: str) -> Tensor:
        """Return the scale of the tensor that a weighted operator reads, 0-dim."""
        path = identity.partition(":")[0]
        return self.parameters_of(identify(path, self.operators[identity].inputs[0]))[0]

    @torch.no_grad()
    def folding(self, identity: str) -> tuple[Tensor | None, Tensor | None]:
        """Return the gain that a fused BatchNorm puts on each channel and the bias after folding, `(out_channels,)`.

        The gain is gamma / sqrt(var + eps), the bias (bias - mean) * gain + beta. Source: Jacob et al. 2018,
        arXiv:1712.05877, equation 14.
        """
        operator = self.operators[identity]
        module = resolve(self.root, identity.partition(":")[0])
        bias = fetch(module, operator.bias)
        if not operator.batch_norm:
            return None, bias
        norm = module.get_submodule(operator.batch_norm.partition("#")[0])
        gain = torch.rsqrt(norm.running_var.float() + norm.eps)
        if norm.weight is not None:
            gain = gain * norm.weight.float()
        shift = -norm.running_mean.float() if bias is None else bias.float() - norm.running_mean
        folded = shift * gain
        return gain, folded if norm.bias is None else folded + norm.bias.float()

    def run_layer(self, identity: str, layer: nn.Module, x: Tensor) -> Tensor:
        """Call a layer, hooks and all, with a rounded weight and bias in place of its own."""
        if not self.quantizes:
            return layer(x)

        def forward(*args: Any) -> Any:
            # Read here, after hooks such as pruning have set it.
            rounded = {"weight": self.quantize_weight(identity, layer.weight)}  # type: ignore[arg-type]
            if layer.bias is not None:
                rounded["bias"] = self.quantize_bias(identity, layer.bias)  # type: ignore[arg-type]
            with shadowed(layer, rounded):
                return type(layer).forward(layer, *args)

        with shadowed(layer, {"forward": forward}):
            return layer(x)

    def run_batch_norm(self, identity: str, norm: nn.Module, x: Tensor) -> Tensor:
        """Call a fused BatchNorm; with running statistics, its bias is rounded as the exported model's will be."""
        frozen = self.phase == "frozen_batch_norm"
        if not self.quantizes or (norm.training and not frozen):
            return norm(x)
        bias = norm.bias if norm.bias is not None else torch.zeros_like(norm.running_mean)
        bias = bias + self.bias_error(identity).to(bias.dtype)
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, bias, False, 0.0, norm.eps)  # type: ignore[arg-type]


@contextmanager
def shadowed(module: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """Let attributes of one instance hide its parameters or methods for the time of a block."""
    before = {name: module.__dict__[name] for name in values if name in module.__dict__}
    module.__dict__.update(values)
    try:
        yield
    finally:
        for name in values:
            module.__dict__.pop(name)
        module.__dict__.update(before)


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
    recipe = recipes.get(recipe)
    analysis = analyze(
        model,
        args,
        kwargs or {},
        runtimes.get(runtime).TABLE,
        selection or Selection(),
        recipe=recipe.name,
        runtime=runtime,
        module=module,
    )
    return Prepared(model, analysis, recipe, observer or recipe.training_observer)


def _compile(module: nn.Module, island: Island, spec: Any, tensors: list[Tensor]) -> _Compiled:
    """Trace a module under its present flags and put the quantizers in."""
    traced = trace(module, spec, tensors, set(island.opaque))
    graph = traced.graph
    nodes = list(graph.nodes)
    keys = {}
    for node in nodes:
        key = island.keys.get(node.meta.get("site"))
        if key is not None:
            keys[key] = node
    with graph.inserting_before(nodes[0]):
        prepared = graph.placeholder("prepared_")
    for operator in island.plan.operators:
        if operator.weight and operator.key in keys:
            _quantize_weight(graph, prepared, keys[operator.key], identify(island.path, operator.key))
        if operator.batch_norm in keys:
            norm = keys[operator.batch_norm]
            identity = identify(island.path, operator.key)
            _call(
                graph,
                prepared,
                norm,
                "run_batch_norm",
                (identity, graph_module(graph, norm), argument(norm, 0, "input")),
            )
    for edge in island.plan.edges:
        if edge.key in keys:
            _quantize_edge(graph, prepared, keys[edge.key], identify(island.path, edge.key))
    graph.lint()
    return _Compiled(_function_of(graph), traced.output_spec)


def graph_module(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Insert a reference to the module that a node calls, looked up in the user's tree at each call."""
    with graph.inserting_before(node):
        return graph.create_node("get_attr", str(node.target))


def _quantize_weight(graph: fx.Graph, prepared: fx.Node, node: fx.Node, identity: str) -> None:
    if node.op == "call_module":
        _call(graph, prepared, node, "run_layer", (identity, graph_module(graph, node), argument(node, 0, "input")))
        return
    for method, position in (("quantize_weight", 1), ("quantize_bias", 2)):
        parameter = argument(node, position, method.removeprefix("quantize_"))
        if parameter is not None:
            with graph.inserting_before(node):
                rounded = graph.call_method(method, (prepared, identity, parameter))
            node.replace_input_with(parameter, rounded)


def _call(graph: fx.Graph, prepared: fx.Node, node: fx.Node, method: str, args: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        node.op, node.target, node.args, node.kwargs = "call_method", method, (prepared, *args), {}


def _quantize_edge(graph: fx.Graph, prepared: fx.Node, node: fx.Node, identity: str) -> None:
    readers = list(node.users)
    with graph.inserting_after(node):
        rounded = graph.call_method("quantize_edge", (prepared, identity, node))
    for reader in readers:
        reader.replace_input_with(node, rounded)


def _function_of(graph: fx.Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<lightning_quant graph>", "exec"), namespace)
    return namespace["forward"]


def identify(path: str, key: str) -> str:
    return f"{path}:{key}"


def fetch(module: nn.Module, name: str) -> Tensor | None:
    if not name:
        return None
    owner, _, attribute = name.rpartition(".")
    return getattr(resolve(module, owner), attribute)
