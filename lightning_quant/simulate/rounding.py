"""What prepared graphs call in training: the same numbers as `Simulation` gives there, in as few operations as can be.

All weights are rounded when a run begins, with scales that are computed in one operation for all of them; what the run
sees of its edges is taken in afterwards, likewise. A layer with hooks or a parametrization, whose weight is not known
before it is called, goes the way of `Simulation`.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.graph.instrument import Instrumented
from lightning_quant.numerics import kernels
from lightning_quant.numerics.fake_quantize import fake_quantize
from lightning_quant.ranges.grids import Grids, Seen
from lightning_quant.simulate.rounded_weights import RoundedWeights
from lightning_quant.simulate.simulation import Simulation
from lightning_quant.surgery.routing import has_hooks, shadowed

_CONVOLUTIONS = frozenset({nn.Conv1d, nn.Conv2d, nn.Conv3d})
_LAYERS = _CONVOLUTIONS | {nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.ReLU}


def rounds_plainly(simulation: Simulation, graph: Instrumented) -> bool:
    """Tell whether a run of a graph can be carried out by `Rounding`: nothing looks on, and every edge has a range."""
    if not simulation.is_plain:
        return False
    if not simulation.quantizers.quantizes:
        return True
    grids = simulation.quantizers.ranges.grids()
    return grids.is_complete or grids.missing.isdisjoint(graph.edges)


def is_traceable(simulation: Simulation, graph: Instrumented, weights: RoundedWeights, module: nn.Module) -> bool:
    """Tell whether compilers can look into a run of a graph as a whole: nothing in it is decided by what it sees.

    Layers with hooks or parametrizations, learned steps, observers that look at all values, and edges without a range
    keep a graph from them. What was seen in a call before must have been taken in.
    """
    quantizers, ranges = simulation.quantizers, simulation.quantizers.ranges
    if ranges.has_seen or ranges.needs_values or quantizers.learned_steps is not None:
        return False
    if quantizers.quantizes and not (ranges.has_grids and weights.are_plain(module)):
        return False
    return rounds_plainly(simulation, graph)


class Rounding:
    """Carries out one run of a prepared graph.

    Attributes:
        rounded: operator to its rounded weight.
    """

    def __init__(self, simulation: Simulation, graph: Instrumented, weights: RoundedWeights, module: nn.Module) -> None:
        self.graph, self.module = graph, module
        quantizers = simulation.quantizers
        self._simulation, self._ranges = simulation, quantizers.ranges
        self._observes = quantizers.observes
        self._learns = quantizers.learns_ranges and quantizers.quantizes
        self._grids: Grids | None = self._ranges.grids() if quantizers.quantizes else None
        self.rounded = weights.rounded(module, self._grids, quantizers.learned_steps) if self._grids else {}
        # Extremes of what a ReLU is still to be applied to, and of what is as it is.
        self._before_relu: dict[str, tuple[Tensor, Tensor]] = {}
        self._plain: dict[str, tuple[Tensor, Tensor]] = {}
        # What kernels see, a row for each edge: minus the lowest and the highest value.
        self._table: Tensor | None = None
        self._rows: dict[str, int] = {}

    def run(self, tensors: list[Tensor]) -> Any:
        """Run the graph on the tensors of a call, and let what was seen count from the next run on."""
        result = self.graph.function(self.module, self, *tensors)
        self._note()
        return self.graph.output_spec.build(result)

    def quantize_edge(self, identity: str, x: Tensor) -> Tensor:
        """Observe and round one tensor, as the phase says."""
        seen_row = self._observe(identity, x, relu=False)
        return x if self._grids is None else self._round(self._grids, identity, x, seen_row)

    def quantize_relu(self, identity: str, relu: nn.Module | None, x: Tensor) -> Tensor:
        """Observe and round what a ReLU returns, in the passes that rounding takes anyway."""
        if self._grids is None or (relu is not None and not _is_plain(relu)) or self._ranges.needs_values:
            return self.quantize_edge(identity, F.relu(x) if relu is None else relu(x))
        seen_row = self._observe(identity, x, relu=True)
        return self._round(self._grids, identity, x, seen_row, relu=True)

    def run_activation(self, identity: str, activation: nn.Module, x: Tensor) -> Tensor:
        """Call an activation that the range of an edge takes over."""
        return activation(x)

    def run_layer(self, identity: str, layer: nn.Module, x: Tensor) -> Tensor:
        """Call a layer with its rounded weight."""
        pull = self._simulation.compared.get(identity)
        return self._run_layer(identity, layer, x) if pull is None else pull(self._run_layer(identity, layer, x))

    def _run_layer(self, identity: str, layer: nn.Module, x: Tensor) -> Tensor:
        if self._grids is None:
            return layer(x)
        weight = self.rounded.get(identity)
        if weight is None or not _is_plain(layer):
            return self._simulation.run_layer(identity, layer, x)
        if type(layer) is nn.Linear:
            return F.linear(x, weight, layer.bias)
        if type(layer) in _CONVOLUTIONS:
            return layer._conv_forward(x, weight, layer.bias)  # type: ignore[operator]
        with shadowed(layer, {"weight": weight}):
            return layer(x)

    def run_function(
        self, identity: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Call a functional layer with its rounded weight."""
        if identity not in self.rounded:
            return self._simulation.run_function(identity, x, weight, bias, *args, **kwargs)
        return self._simulation.function_of(identity)(x, self.rounded[identity], bias, *args, **kwargs)

    def run_add(self, identity: str, first: Tensor, second: Tensor) -> Tensor:
        """Add two quantized tensors."""
        return first + second

    def run_batch_norm(self, identity: str, norm: nn.Module, x: Tensor) -> Tensor:
        """Call a BatchNorm that is fused into an operator before it."""
        return self._simulation.run_batch_norm(identity, norm, x)

    def run_affine(self, identity: str, index: int, x: Tensor, value: Tensor | float) -> Tensor:
        """Put a factor or shift on what an operator computed that it is fused into."""
        return self._simulation.run_affine(identity, index, x, value)

    def run_functional_batch_norm(self, identity: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call a BatchNorm that is no layer of PyTorch's and is fused into an operator before it."""
        return self._simulation.run_functional_batch_norm(identity, x, *args, **kwargs)

    def _round(self, grids: Grids, identity: str, x: Tensor, seen_row: int | None, *, relu: bool = False) -> Tensor:
        if self._learns and identity not in self._ranges.wide:
            return self._simulation.quantizers.round_learning(identity, x, relu=relu)
        row, grid = self._ranges.rows[identity], self._ranges.grids_by_edge[identity]
        if kernels.serve_values(x):
            seen = (None, 0) if seen_row is None else (self._table, seen_row)
            rows = kernels.EdgeRows(grids.scales, grids.zero_points, row, grid, relu, *seen)
            return kernels.round_values(x, rows)
        if torch.compiler.is_compiling() or grids.numbers is None:
            return fake_quantize(x, grids.scales[row], grids.zero_points[row], grid, relu=relu)
        return fake_quantize(x, *grids.numbers[row], grid, relu=relu)

    def _observe(self, identity: str, x: Tensor, *, relu: bool) -> int | None:
        """Look at an edge; return the row for its extremes where the kernel that rounds it is to fill it in."""
        if not self._observes or not self._ranges.edges[identity].observed or x.numel() == 0:
            return None
        if self._ranges.needs_values:
            self._ranges.observe(identity, x)
        elif kernels.serve_values(x):
            if self._table is None:
                self._table = torch.full((len(self.graph.edges), 2), -torch.inf, dtype=torch.float32, device=x.device)
            row = self._rows[identity] = len(self._rows)
            if self._grids is not None:
                return row
            kernels.observe_values(x, self._table, row)
        else:
            low, high = torch.aminmax(x.detach())
            (self._before_relu if relu else self._plain)[identity] = low, high
        return None

    def _note(self) -> None:
        if self._table is not None:
            rows = self._table[: len(self._rows)]
            self._ranges.note(Seen(tuple(self._rows), -rows[:, 0], rows[:, 1]))
        parts = [(seen, bound) for seen, bound in ((self._before_relu, 0.0), (self._plain, None)) if seen]
        if not parts:
            return
        lows: list[Tensor] = []
        highs: list[Tensor] = []
        for seen, bound in parts:
            for ends, side in ((lows, 0), (highs, 1)):
                end = torch.stack([extremes[side] for extremes in seen.values()])
                ends.append(end if bound is None else end.clamp(min=bound))
        self._ranges.note(Seen((*self._before_relu, *self._plain), torch.cat(lows), torch.cat(highs)))


def _is_plain(module: nn.Module) -> bool:
    """Tell whether calling a module is calling torch's function with its parameters, and nothing else."""
    hooks = nn.modules.module
    is_watched = hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks
    return type(module) in _LAYERS and "forward" not in module.__dict__ and not has_hooks(module) and not is_watched
