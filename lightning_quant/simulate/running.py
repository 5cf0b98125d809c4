"""Runs of prepared graphs: which graph serves a call, and who carries it out."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_quant.calls.calls import CallSpec, flatten_call
from lightning_quant.graph.instrument import Instrumented, instrument
from lightning_quant.graph.size_conditions import decides
from lightning_quant.layers.placement import placed
from lightning_quant.numerics.exact import exact_arithmetic
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.simulate.rounded_weights import RoundedWeights
from lightning_quant.simulate.rounding import Rounding, is_traceable, rounds_plainly
from lightning_quant.simulate.simulation import Simulation
from lightning_quant.surgery.routing import device_of, resolve

_CONSTANTS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Entry:
    """A graph with quantizers, its weighted operators, and the names of its inputs."""

    graph: Instrumented
    weights: RoundedWeights
    names: tuple[str, ...]


class Runner:
    """Runs the graphs of a prepared module: one for each structure of a call and each set of train and eval flags.

    Args:
        model: gets to know the sizes of calls.
        simulation: carries out what training's shortcut cannot, and has the quantizers.
        displaced: gives the float layers to trace with, on the module's device, where others stand in their places.
    """

    def __init__(
        self, model: PlannedModel, simulation: Simulation, displaced: Callable[[], dict[str, nn.Module]]
    ) -> None:
        self._model, self._simulation, self._displaced = model, simulation, displaced
        self._quantizers, self._more_bits = simulation.quantizers, 0
        self._graphs: dict[Any, Entry] = {}
        # Graphs of another binding of the same plan, which has run such calls before.
        self._known: dict[Any, Instrumented] = {}
        # Calls whose forward branches on sizes have a graph for each.
        self._of_sizes: set[Any] = set()
        # By what can be told of a call without binding it to the signature: a graph, and where its inputs stand among
        # positional and then keyword arguments.
        self._calls: dict[Any, tuple[Entry, tuple[int, ...]]] = {}

    def run(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an island's graph on a call."""
        quantizers, simulation = self._quantizers, self._simulation
        device = device_of(quantizers.root)
        if quantizers.ranges.device != device:
            quantizers.to(device)
        self._follow_bits()
        module = resolve(quantizers.root, path)
        entry, tensors = self._find(path, module, args, kwargs)
        if not path:
            self._model.note_sizes_of(entry.names, tensors)
        quantizers.ranges.begin_run(entry.graph.edges, observing=quantizers.observing)
        if rounds_plainly(simulation, entry.graph):
            return Rounding(simulation, entry.graph, entry.weights, module).run(tensors)
        exact = exact_arithmetic() if simulation.computes_integers or simulation.only is not None else nullcontext()
        with quantizers.ranges.running(), exact:
            result = entry.graph.function(module, simulation, *tensors)
        return entry.graph.output_spec.build(result)

    def is_traceable(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether the graph of a call is there and compilers can look into it."""
        module, kinds = resolve(self._quantizers.root, path), _kinds(args, kwargs)
        key = (path, kinds, _flags(module))
        if kinds is None or key not in self._calls or self._quantizers.ranges.more_bits != self._more_bits:
            return False
        entry, _ = self._calls[key]
        return is_traceable(self._simulation, entry.graph, entry.weights, module)

    def know(self, other: "Runner") -> None:
        """Run the graphs that another binding of the same plan has traced: they call whatever module they are given."""
        self._of_sizes |= other._of_sizes
        self._known = {**other._known, **{key: entry.graph for key, entry in other._graphs.items()}}

    def graph(self, path: str, spec: CallSpec, tensors: list[Tensor]) -> Instrumented:
        """Return the graph that runs an island on calls of this structure under the module's present flags."""
        return self._entry(path, spec, tensors).graph

    def _follow_bits(self) -> None:
        """Let entries, which know the grids of weights, be made anew where these have changed."""
        if self._more_bits != self._quantizers.ranges.more_bits:
            self._more_bits = self._quantizers.ranges.more_bits
            self._known |= {key: entry.graph for key, entry in self._graphs.items()}
            self._graphs, self._calls = {}, {}

    def _entry(self, path: str, spec: CallSpec, tensors: list[Tensor]) -> Entry:
        quantizers, module = self._quantizers, resolve(self._quantizers.root, path)
        key: Any = (path, spec.key(), _flags(module))
        sizes = tuple(tensor.shape for tensor in tensors)
        key = (key, sizes) if key in self._of_sizes else key
        if key not in self._graphs:
            graph = self._known.get(key)
            if graph is None:
                with placed(quantizers.root, self._displaced()):
                    graph = instrument(module, quantizers.islands[path], spec, tensors)
            if decides(graph.graph) and key[-1] is not sizes:
                self._of_sizes.add(key)
                key = (key, sizes)
            self._graphs[key] = Entry(graph, RoundedWeights(quantizers, graph.operators), spec.names)
        return self._graphs[key]

    def _find(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Entry, list[Tensor]]:
        given, kinds = (*args, *kwargs.values()), _kinds(args, kwargs)
        key = (path, kinds, _flags(module))
        if kinds is not None and key in self._calls:
            entry, positions = self._calls[key]
            return entry, [given[position] for position in positions]
        spec, tensors = flatten_call(self._quantizers.islands[path].signature, args, kwargs)
        entry = self._entry(path, spec, tensors)
        places = {id(value): place for place, value in enumerate(given) if isinstance(value, Tensor)}
        # A tensor that was passed twice may come as two the next time.
        known = kinds is not None and not decides(entry.graph.graph)
        if known and len(places) == sum(isinstance(value, Tensor) for value in given):
            self._calls[key] = entry, tuple(places[id(tensor)] for tensor in tensors)
        return entry, tensors


def _kinds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return what tells calls apart that different graphs serve; None when a value has more in it than that."""
    values = (*args, *kwargs.values())
    if not all(isinstance(value, (Tensor, *_CONSTANTS)) for value in values):
        return None
    return (*kwargs, *(Tensor if isinstance(value, Tensor) else (type(value), value) for value in values))


def _flags(module: nn.Module) -> tuple[bool, ...]:
    """Return the train and eval flags of a tree."""
    flags, waiting = [], [module]
    while waiting:
        child = waiting.pop()
        flags.append(child.training)
        waiting += [below for below in child._modules.values() if below is not None]
    return tuple(flags)
