"""A module with its plan and the state of its quantizers, routed to graphs that round.

Only `forward` of the module (or of its islands) is routed to a graph that calls the user's own submodules by path.
Observers and ranges are plain tensors outside the module.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_quant.calls.calls import CallSpec
from lightning_quant.errors import QuantizationError
from lightning_quant.graph.analyze import Analysis
from lightning_quant.graph.instrument import Instrumented
from lightning_quant.graph.plan import Plan
from lightning_quant.layers.leftovers import kept_as_whole, left_in_float
from lightning_quant.layers.placement import placed
from lightning_quant.planned.in_graphs import store_layers
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.simulate.distillation import Teacher
from lightning_quant.simulate.quantizers import Control, Quantizers
from lightning_quant.simulate.running import Runner
from lightning_quant.simulate.simulation import Simulation
from lightning_quant.surgery.compilation import kept_from_compilers
from lightning_quant.surgery.host import HOST, copied_to, on_host
from lightning_quant.surgery.routing import Route, copied, device_of, resolve, route, unroute


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


class Prepared(Quantizers, PlannedModel):
    """A module, its plan, and the state of its quantizers.

    Attributes:
        simulation: runs the graphs' operators as the phase says.
        varying: `(input, dimension)` whose size differed from the captured call in some call since.
        left: labels of the layers that graphs have no integer form of.
        teacher: teaches what the float module answers, while it trains through rounding; None without one.
        taught: identities of the operators inside it whose results it teaches, too.
        scaling_groups: which tensors can be scaled channel by channel, of `calibrate.groups`; None until they
            are asked for. Bindings of the same plan share them.
        masks: inputs that may be masks to the value at places that they hide, None where that is none; as far as calls
            have been looked at.
        displaced: float layers whose places stored ones have taken while a block runs.
    """

    recipe: Recipe

    def __init__(self, root: nn.Module, analysis: Analysis, recipe: Recipe, observer: str) -> None:
        super().__init__(root, analysis, recipe, observer)
        self.plan, self.captured = kept_as_whole(root, analysis.plan), analysis.captured
        # What runs in deep copies of the routed module: target networks, teachers.
        self._twins: weakref.WeakSet[Prepared] = weakref.WeakSet()
        self.varying: set[tuple[str, int]] = set()
        self._stored: tuple[dict[str, nn.Module], Plan] | None = None
        self.teacher: Teacher | None = None
        self.taught: set[str] = set()
        self.left = left_in_float(root, self.plan)
        self.scaling_groups: list[Any] | None = None
        self.masks: dict[str, int | None] = {}
        # Float layers whose places stored ones have taken; graphs are traced with them.
        self.displaced: dict[str, nn.Module] = {}
        self.simulation = Simulation(self)
        self._runner = self._new_runner()

    def __getstate__(self) -> dict[str, Any]:
        # What is made again when it is needed; weak references cannot be pickled.
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_runner", "_twins", "_stored")}
        return {**kept, "teacher": None, "scaling_groups": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _twins=weakref.WeakSet(), _stored=None)
        self._runner = self._new_runner()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Prepared":
        """Return what a copy of the routed module runs: the same ranges, in the same phase, moving none of them."""
        twin = memo[id(self)] = self.bound_to(self.root)
        twin.root = copied(self.root, memo)
        twin.control, twin.is_twin = self.control, True
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
    def has_graphs(self) -> bool:
        """Whether graphs take the place of the module's own code: they do."""
        return True

    @property
    def rounds_now(self) -> bool:
        """Whether a call of the module is rounded as things stand."""
        return self.is_attached and self.quantizes

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

    def bound_to(self, root: nn.Module, tensors: list[Tensor] | None = None) -> Self:
        """Return the same plan and ranges over another module of the same structure, and another captured call."""
        other = copy.copy(self)
        other.root = root
        other.captured = self.captured if tensors is None else replace(self.captured, tensors=tensors)
        other.control, other._twins, other.is_twin, other.teacher = Control(), weakref.WeakSet(), False, None
        other.simulation, other._stored, other.displaced = Simulation(other), None, {}
        other._runner = other._new_runner()
        return other

    def anew(self, root: nn.Module) -> Self:
        """Return the same plan over another module, with nothing learned as yet."""
        other = self.bound_to(root)
        other.ranges, other.varying = self.ranges.anew(self.recipe, self.observer), set(self.varying)
        other.bias_corrections, other.layers, other.channels, other.masks = {}, {}, {}, {}
        if self.learned_steps is not None:
            other.learned_steps = None
            other.begin_learning()
        return other

    def apart(self, root: nn.Module) -> Self:
        """Return over another module what would be exported now, of the recipe's bits; what it learns stays its own."""
        other = self.bound_to(root)
        # At once: ranges know the steps.
        other.ranges, other.learned_steps = copied((self.ranges, self.learned_steps))
        other.varying = set(self.varying)
        other.ranges.waits = False
        other.anneal_bits(0.0)
        return other

    def know_graphs(self, other: "Prepared") -> None:
        """Trace nothing anew that another binding of the same plan has traced."""
        self._runner.know(other._runner)
        self.scaling_groups = other.scaling_groups

    def stored_layers(self) -> dict[str, nn.Module]:
        """Return the layers whose weights are left to recipes of layers, made of those that the module has."""
        return self._storing()[0]

    def stored_plan(self) -> Plan:
        """Return the plan, with rows of these layers: which scheme each took follows from its weights, too."""
        return self._storing()[1]

    def _storing(self) -> tuple[dict[str, nn.Module], Plan]:
        if self._stored is None:
            layers, plan = store_layers(self, self.recipe, self.plan, self.left)
            # They are made on the CPU, and run beside the module's own layers.
            self._stored = self.beside(layers), plan
        return self._stored

    def beside(self, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Return layers on the module's device: copies, where they are elsewhere."""
        device = device_of(self.root)
        return {
            n: layer if device_of(layer) == device else copied_to(layer, device, in_float32=False)
            for n, layer in layers.items()
        }

    def on_host(self) -> Self:
        """Return the same over a float32 module on the CPU, where it is converted and measured: itself if it is so."""
        root = on_host(self.root)
        self.to(HOST)
        return self if root is self.root else self.bound_to(root)

    def _new_runner(self) -> Runner:
        return Runner(self, self.simulation, lambda: self.beside(self.displaced))

    def learn_from(self, teacher: Teacher) -> None:
        """Have the module taught while it trains through rounding.

        Raises:
            QuantizationError: a layer that is to be taught is none that is rounded.
        """
        layers = {o.name: i for i, o in self.operators.items() if o.weight and o.weight == f"{o.key}.weight"}
        self.teacher, self.taught = teacher, {layers[name] for name in teacher.layers_of(layers)}

    def run(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an island's graph on a call, and have it taught where there is a teacher."""
        if self.teacher is None or not (self.quantizes and self.root.training and torch.is_grad_enabled()):
            return self._runner.run(path, args, kwargs)
        inside = {i: o.key for i, o in self.operators.items() if i in self.taught and o.path == path}
        self.teacher.begin(resolve(self.root, path), inside.values(), args, kwargs)
        pulled = self.teacher.pulled
        pulls: dict[str, Callable[[Tensor], Tensor]] = {i: functools.partial(pulled, key) for i, key in inside.items()}
        with self.simulation.comparing(pulls):
            return self.teacher.teach(self._runner.run(path, args, kwargs))

    def is_traceable(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether compilers can look into the graph that runs on a call."""
        return self.teacher is None and self._runner.is_traceable(path, args, kwargs)

    def graph(self, path: str, spec: CallSpec, tensors: list[Tensor]) -> Instrumented:
        """Return the graph that runs an island on calls of this structure under the module's present flags."""
        return self._runner.graph(path, spec, tensors)
