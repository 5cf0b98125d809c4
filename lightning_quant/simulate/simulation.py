"""What prepared graphs call while they run: observing, rounding, and the arithmetic of integer kernels."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_quant.graph.moves import border_of
from lightning_quant.numerics import integer
from lightning_quant.numerics.fake_quantize import along, fake_quantize, fake_quantize_weight
from lightning_quant.numerics.folding import Folded
from lightning_quant.numerics.learned_steps import quantize_with_learned_step
from lightning_quant.numerics.visible import visible
from lightning_quant.simulate.looks import Looks
from lightning_quant.simulate.quantizers import Quantizers
from lightning_quant.surgery.routing import fetch, has_hooks, shadowed, unparametrized

# Where a tensor keeps the group of its edge and the integers that it stands for.
_CARRIED = "lightning_quant_integers"


class Simulation(Looks):
    """Runs the operators of a prepared module as its phase says.

    Attributes:
        quantizers: whose operators, ranges and phase count.
        integers: edge to the integers, without zero point and not clipped, that its producer has just computed for it.
    """

    def __init__(self, quantizers: Quantizers) -> None:
        super().__init__()
        self.quantizers = quantizers
        self.integers: dict[str, Tensor] = {}

    def rounds(self, identity: str) -> bool:
        """Tell whether an operator's weight or an edge is rounded now."""
        return self.quantizers.quantizes and (self.only is None or identity in self.only)

    @property
    def is_plain(self) -> bool:
        """Whether a run does what training does: nothing looks on, all is rounded, and nothing is adjusted."""
        looks_on = (self.only, self.watcher, self.recorded, self.jitter, self.input_means, self.hidden)
        changed = self.quantizers.channels or self.quantizers.layers or self.quantizers.ranges.chosen
        return all(value is None for value in looks_on) and not changed and not self.computes_integers

    @property
    def computes_integers(self) -> bool:
        """Whether operators compute what integer kernels do: in evaluation, without gradients or after calibration."""
        in_evaluation = not self.quantizers.root.training and (not torch.is_grad_enabled() or self.quantizers.adjusted)
        return in_evaluation and self.only is None and self.quantizers.quantizes

    def quantize_edge(self, identity: str, x: Tensor) -> Tensor:
        """Observe and round one tensor, as the phase says."""
        if self.quantizers.observes:
            for quantizers in (self.quantizers, *(other for other, _ in self.beside)):
                seen = quantizers.on_grid(identity, x, clipped=True)
                quantizers.ranges.observe(identity, visible(seen, self.hidden))
        if self.watcher is not None:
            self.watcher(identity, x)
        if not self.rounds(identity) or self.quantizers.learns_range(identity):
            return self.quantizers.round_learning(identity, x) if self.rounds(identity) else x
        scale, zero_point = self.quantizers.ranges.parameters(identity)
        grid, integers = self.quantizers.ranges.grid_of(identity), self.integers.pop(identity, None)
        carries = x.dtype == torch.float32 and self._carries(identity)
        if integers is None and not carries:
            rounded = fake_quantize(self._moved(self.quantizers.on_grid(identity, x)), scale, zero_point, grid)
        else:
            integers = self._moved(x).div(scale).round_() if integers is None else integers
            integers.clamp_(grid.low - zero_point.item(), grid.high - zero_point.item())
            rounded = (integers * scale).to(x.dtype)
        if carries:
            rounded.__dict__[_CARRIED] = self.quantizers.ranges.edges[identity].shared, integers
        if self.recorded is not None:
            integers = torch.round(rounded.detach().float() / scale + zero_point)
            self.recorded.append((identity, integers.to(grid.dtype)))
        channels = self.quantizers.channels.get(identity)
        return rounded if channels is None else channels.from_grid(rounded)

    def quantize_relu(self, identity: str, relu: nn.Module | None, x: Tensor) -> Tensor:
        """Call a ReLU, a module or the function, and observe and round what it returns."""
        return self.quantize_edge(identity, self.run_activation(identity, F.relu if relu is None else relu, x))

    def run_activation(self, identity: str, activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Call an activation that the range of an edge takes over, unless nobody sees what it would make."""
        is_seen = isinstance(activation, nn.Module) and has_hooks(activation)
        return x if identity in self.integers and self.watcher is None and not is_seen else activation(x)

    def _carries(self, identity: str) -> bool:
        """Tell whether the integers of an edge go with its values, for operators that would compute them anew."""
        return self.computes_integers and not torch.is_grad_enabled() and identity not in self.quantizers.channels

    def _integers_of(self, identity: str, x: Tensor) -> Tensor:
        """Return the integers, without zero point, that values of an edge stand for."""
        shared, integers = x.__dict__.get(_CARRIED, ("", None))
        if integers is not None and shared == self.quantizers.ranges.edges[identity].shared and self._carries(identity):
            return integers
        scale, _ = self.quantizers.ranges.parameters(identity)
        return (self.quantizers.on_grid(identity, x.float()) / scale).round_()

    def run_layer(self, identity: str, layer: nn.Module, x: Tensor) -> Tensor:
        """Call a layer, hooks and all, with a rounded weight in place of its own."""
        if not self.rounds(identity):
            self._note_input(identity, x, border_of(layer))
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
        function = self.function_of(identity)
        if not self.rounds(identity):
            self._note_input(identity, x)
            return function(x, weight, bias, *args, **kwargs)
        return self._run_weighted(identity, x, weight, bias, lambda x, w, b: function(x, w, b, *args, **kwargs))

    def function_of(self, identity: str) -> Callable[..., Tensor]:
        """Return what computes a functional layer."""
        return getattr(F, self.quantizers.operators[identity].kind)

    def run_add(self, identity: str, first: Tensor, second: Tensor) -> Tensor:
        """Add two quantized tensors."""
        operator = self.quantizers.operators[identity]
        edges, output = operator.reads, operator.writes
        rounded = all(edge in self.quantizers.ranges.edges for edge in edges)
        if self.computes_integers and operator.quantized_output and rounded:
            one, other = (self.quantizers.ranges.parameters(edge) for edge in edges)
            operands = self._integers_of(edges[0], first), self._integers_of(edges[1], second)
            grid = self.quantizers.ranges.parameters(output)
            self.integers[output] = integer.add(*operands, (one, other), grid, self._round)
        return first + second

    def run_batch_norm(self, identity: str, norm: nn.Module, x: Tensor) -> Tensor:
        """Call a BatchNorm that is fused into an operator, unless that one computed it in integers already."""
        if self._is_normalized(identity, 0):
            return x
        if self.quantizers.phase != "frozen_batch_norm":
            return norm(x)
        mean, variance = fetch(norm, "running_mean"), fetch(norm, "running_var")
        return F.batch_norm(x, mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)  # type: ignore[arg-type]

    def run_functional_batch_norm(
        self,
        identity: str,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """The same for a BatchNorm that is no layer of PyTorch's, with the arguments of `F.batch_norm`."""
        if self._is_normalized(identity, 0):
            return x
        training = training and self.quantizers.phase != "frozen_batch_norm"
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)

    def run_affine(self, identity: str, index: int, x: Tensor, value: Tensor | float) -> Tensor:
        """Put a factor or shift that is fused into an operator on its result, unless that has it already."""
        is_there = self._is_normalized(identity, index + 1)
        return x if is_there else self.quantizers.operators[identity].affine[index].of(x, value)

    def _is_normalized(self, identity: str, step: int) -> bool:
        """Tell whether an operator has its BatchNorm, and steps behind that, computed already."""
        if identity not in self._normalized:
            return self.computes_integers
        if step == len(self.quantizers.operators[identity].affine):
            self._normalized.remove(identity)
        return True

    def _round(self, x: Tensor) -> Tensor:
        """Round in place what was computed for it: memory costs more than arithmetic."""
        return self._moved(x).round_()

    def _moved(self, x: Tensor) -> Tensor:
        return x if self.jitter is None else integer.jittered(x, self.jitter, self._together)

    def _run_weighted(
        self, identity: str, x: Tensor, weight: Tensor, bias: Tensor | None, call: Callable[..., Tensor]
    ) -> Tensor:
        computed = self.quantizers.computes_weight(identity)
        kept = self.kept.get(identity) if self.kept is not None and not computed else None
        folded = self.quantizers.folded(identity, weight=weight.detach() if computed else None) if not kept else kept[0]
        if self.only is not None:
            return self._run_alone(identity, folded, x, call)
        if not self.computes_integers:
            return call(x, self._rounded_weight(identity, weight, folded), bias)
        operator = self.quantizers.operators[identity]
        edge = operator.reads[0]
        integers = kept[1] if kept else self.quantizers.weight_integers(identity, folded)
        if self.kept is not None:
            self.kept[identity] = kept or (folded, integers, integer.summed_with(folded.bias_integers))
        with torch.autocast(x.device.type, enabled=False):
            bias, exact = (kept[2], True) if kept and kept[2] is not None else (folded.bias_integers, False)
            sums = call(self._integers_of(edge, x), integers, bias if exact else None)
        axis = -1 if operator.kind == "linear" else 1
        step = along(folded.bias_step, sums, axis)
        sums = sums if exact else sums.add_(along(bias, sums, axis))
        if operator.quantized_output and not operator.moved:
            output = operator.writes
            scale, _ = self.quantizers.ranges.parameters(output)
            self.integers[output] = integer.requantize(sums, step, scale, self._round)
        return sums.mul_(step).to(x.dtype)

    def _rounded_weight(self, identity: str, weight: Tensor, folded: Folded) -> Tensor:
        if self.quantizers.learned_steps is None:
            return fake_quantize_weight(weight, folded.unfolded_scale)
        quant_max = self.quantizers.weight_quant_max(identity)
        step = self.quantizers.learned_steps.step_of(identity, weight, quant_max)
        # A scale that was stretched for the sake of the bias is not the learned one, and passes no gradient to it.
        step = torch.where(folded.unfolded_scale > step * 1.0001, folded.unfolded_scale, step)
        return quantize_with_learned_step(weight, step, quant_max)

    def _run_alone(self, identity: str, folded: Folded, x: Tensor, call: Callable[..., Tensor]) -> Tensor:
        """Compute a layer with a rounded weight among others that stay float."""
        operator = self.quantizers.operators[identity]
        edge = operator.reads[0]
        integers = self.quantizers.weight_integers(identity, folded)
        weight = integers * along(folded.scale, integers)
        y = call(self.quantizers.on_grid(edge, x.float()), weight, None)
        y = y + along(folded.bias, y, -1 if operator.kind == "linear" else 1)
        channels = self.quantizers.channels.get(operator.writes)
        y = (y if channels is None else channels.from_grid(y)).to(x.dtype)
        if operator.batch_norm or operator.affine:
            self._normalized.add(identity)
        return y

    def _note_input(self, identity: str, x: Tensor, border: tuple[list[int], str] | None = None) -> None:
        if not self.quantizers.observing or self.input_means is None:
            return
        x = x if border is None else F.pad(x, *border)
        operator = self.quantizers.operators[identity]
        for quantizers, means in ((self.quantizers, self.input_means), *self.beside):
            if means is not None:
                on_grid = quantizers.on_grid(operator.reads[0], x)
                seen = visible(on_grid, self.hidden) if operator.kind == "linear" else on_grid
                means.update(identity, operator.kind, seen)
