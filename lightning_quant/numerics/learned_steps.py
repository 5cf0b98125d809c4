"""Learned step sizes: the scales of weights, and of activations, are trained together with the weights.

Source: Esser et al. 2020, arXiv:1902.08153, equations 1 to 3; of activations, whose zero point is learned too, Bhalgat
et al. 2020 (LSQ+), arXiv:2004.09576, equations 4 to 7. Steps of weights begin with the least squared error (section 3.2
of that): the first paper's 2 mean|w| / sqrt(Q) is 1.7 times the best one of normal weights in four bits. Activations
begin with the first paper's step, since what is clipped passes no gradient to any layer before it. The logarithm of
each step is what Adam moves, so that one learning rate suits steps of any size and none turns negative; the papers'
gradient scales, 1 / sqrt(N Q), have the same purpose and cancel in Adam. In the papers weights and steps have one
learning rate, which comes down; here that of steps comes down with that of the user's optimizers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_quant.numerics.fake_quantize import SMALLEST_SCALE, along, channel_maximum, least_error_scale
from lightning_quant.numerics.grid import Grid

# Integers of four bits, but for zero: for more, the published first range of activations is too wide.
_FEW_STEPS = 15


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, quant_max: int) -> Tensor:
        ctx.save_for_backward(weight, step)
        ctx.quant_max = quant_max
        integers = torch.round(weight.float() / step).clamp_(-quant_max, quant_max)
        return (integers * step).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, step = ctx.saved_tensors
        ratio = weight.float() / step
        inside = ratio.abs() <= ctx.quant_max
        clipped = ratio.clamp(-ctx.quant_max, ctx.quant_max)
        slope = torch.where(inside, torch.round(ratio) - ratio, torch.round(clipped))
        by_channel = (grad.float() * slope).flatten(1).sum(1)
        return grad * inside, by_channel.view_as(step), None


def quantize_with_learned_step(weight: Tensor, step: Tensor, quant_max: int) -> Tensor:
    """Round a weight to multiples of its channel's step, with gradients for both.

    Args:
        weight: `(out_channels, ...)`, any float dtype; its gradient is 0 where it is clipped.
        step: `(out_channels,)`, positive, float32; its gradient is that of equation 3.
        quant_max: highest integer of the grid.
    """
    return _LearnedStep.apply(weight, along(step, weight), quant_max)


class _LearnedRange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, grid: Grid, relu: bool) -> Tensor:
        scale, zero_point = _scale_and_zero_point(values, grid)
        lowest, highest = grid.low - zero_point, grid.high - zero_point
        lowest = lowest.clamp(min=0) if relu else lowest
        y = (x.float() / scale).round_().clamp_(lowest, highest).mul_(scale)
        ctx.save_for_backward(x, y, scale, lowest, highest)
        # Where zero is the end of the range, or its middle, it stays so: below zero would be integers of no use.
        is_inside = (values[1] > 0) & (values[1] < 1)
        ctx.moves = 0.0 if grid.symmetric or relu else is_inside * float(grid.high - grid.low)
        ctx.relu = relu
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, y, scale, lowest, highest = ctx.saved_tensors
        bottom = torch.zeros_like(scale) if ctx.relu else (lowest - 0.5) * scale
        passed = torch.where((x > bottom) & (x < (highest + 0.5) * scale), grad, 0)
        # dy/dlog(scale) is y - x where a value is rounded, and y where it is clipped.
        by_scale = (grad * y).float().sum() - (passed * x).float().sum()
        # dy/dzero is minus a step where a value is clipped.
        by_zero = (passed.float().sum() - grad.float().sum()) * scale * ctx.moves
        return passed, torch.stack([by_scale, by_zero]), None, None


def quantize_with_learned_range(x: Tensor, values: Tensor, grid: Grid, relu: bool = False) -> Tensor:
    """Round activations to a grid whose scale and zero point are learned, with gradients for all three.

    Args:
        x: any shape and float dtype; its gradient is 0 where it is clipped.
        values: `(2,)`, float32: the logarithm of the scale, and the zero point as a share of the grid.
        grid: the integers.
        relu: whether to round what a ReLU makes of x.
    """
    return _LearnedRange.apply(x, values, grid, relu)


def first_range(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the range that learning begins with: that of a step of 2 mean|x| / sqrt(Q).

    Beyond four bits it would be many times as wide as the data, and ends where these do.

    Source: Esser et al. 2020, arXiv:1902.08153, section 2.1, where Q is the highest integer.

    Args:
        x: the first batch, any shape and float dtype.
        grid: the integers.
    """
    lowest, highest = torch.aminmax(x.detach().float())
    steps, lowest = grid.high - grid.low, lowest.clamp(max=0)
    above_zero = torch.where(lowest < 0, steps // 2, steps)
    step = 2 * x.detach().float().abs().mean() / above_zero.sqrt()
    low = (above_zero - steps) * step
    high = low + steps * step
    return (low, high) if steps <= _FEW_STEPS else (torch.maximum(low, lowest), torch.minimum(high, highest))


def _scale_and_zero_point(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    scale, share = values.detach().unbind()
    zero_point = torch.round(grid.low + share * (grid.high - grid.low)).clamp(grid.low, grid.high)
    return scale.exp(), torch.full_like(zero_point, grid.middle) if grid.symmetric else zero_point


class LearnedSteps:
    """The steps of all weights of a model, and the optimizer that moves them; of activations too, where that is asked.

    It is the quantizer's own: the user's optimizers, their states and their checkpoints stay those of the float run.

    Attributes:
        logarithms: operator to the logarithm of its steps, `(out_channels,)`; and `EDGES` and the name of a group of
            edges to the logarithm of their scale and their zero point as a share of the grid, `(2,)`.
    """

    EDGES = "edges "

    def __init__(self, learning_rate: float) -> None:
        self.logarithms: dict[str, Tensor] = {}
        self.learning_rate = learning_rate
        # The highest learning rate that each optimizer of the user's has had since.
        self._highest: dict[int, float] = {}
        # What processes have not agreed on by now: each has begun from values of its own.
        self._new: set[str] = set()
        # No weight decay: a step is no weight.
        self._optimizer: torch.optim.Adam | None = None
        self._saved_optimizer: dict[str, Any] | None = None

    def step_of(self, identity: str, weight: Tensor, quant_max: int) -> Tensor:
        """Return the steps of an operator's weight, `(out_channels,)`; the first time they follow from the weight."""
        if identity not in self.logarithms:
            first = least_error_scale(weight, channel_maximum(weight) / quant_max, quant_max)
            self.logarithms[identity] = first.clamp(min=SMALLEST_SCALE).log().requires_grad_()
        return self.logarithms[identity].exp()

    def range_of(self, group: str, first: Callable[[], tuple[Tensor, Tensor]], grid: Grid) -> Tensor:
        """Return what is learned of the range of a group of edges, `(2,)`.

        Args:
            group: its name.
            first: gives the scale and zero point to begin with.
            grid: the integers.
        """
        name = self.EDGES + group
        if name not in self.logarithms:
            scale, zero_point = first()
            share = (zero_point - grid.low) / (grid.high - grid.low)
            self.logarithms[name] = torch.stack([scale.log(), share]).requires_grad_()
            self._new.add(name)
        return self.logarithms[name]

    def parameters(self, group: str, grid: Grid) -> tuple[Tensor, Tensor] | None:
        """Return the scale and the zero point of a group of edges, 0-dim; None where they are not learned."""
        values = self.logarithms.get(self.EDGES + group)
        return None if values is None else _scale_and_zero_point(values, grid)

    def update(
        self,
        reduce: Callable[[Tensor], Tensor] | None = None,
        *,
        factor: float = 1.0,
        with_edges: bool = True,
        rate: tuple[int, float] = (0, 1.0),
    ) -> None:
        """Move the steps by their gradients, and clear these.

        Args:
            reduce: means of a tensor over all processes; every one must call it alike.
            factor: of the gradients, where the loss was multiplied by its reciprocal.
            with_edges: whether those of activations are moved, too.
            rate: which optimizer is about to move weights, and by which learning rate; steps move by the share that
                this is of the highest it has had.
        """
        if not self.logarithms:
            return
        number, now = rate
        highest = self._highest[number] = max(self._highest.get(number, 0.0), now)
        names = sorted(self.logarithms)
        logarithms = [self.logarithms[name] for name in names]
        if reduce is not None:
            self._agree(reduce)
        # All in one tensor: processes meet once, and an accelerator is waited for once.
        grads = torch.cat([torch.zeros_like(v) if v.grad is None else v.grad for v in logarithms])
        grads = (grads if reduce is None else reduce(grads)) * factor
        for name, grad in zip(names, grads.split([len(v) for v in logarithms]), strict=True):
            # Without one, not even momentum moves it.
            is_fixed = name.startswith(self.EDGES) and not with_edges
            self.logarithms[name].grad = None if is_fixed else grad
        # All zero: another optimizer of the user's has taken these gradients, and momentum alone must not count twice.
        if not bool(torch.isfinite(grads).all() & grads.any()):
            self._clear()
            return
        if self._optimizer is None or len(self._optimizer.param_groups[0]["params"]) != len(names):
            parameters = [self.logarithms[name] for name in names]
            self._optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, weight_decay=0.0)
            if self._saved_optimizer is not None:
                self._optimizer.load_state_dict(self._saved_optimizer)
                self._saved_optimizer = None
        self._optimizer.param_groups[0]["lr"] = self.learning_rate * (now / highest if highest > 0 else 0.0)
        self._optimizer.step()
        self._clear()

    def _agree(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Begin with the mean of what processes have begun with, each on a batch of its own."""
        names = sorted(self._new)
        if names:
            agreed = reduce(torch.cat([self.logarithms[name].detach() for name in names]))
            for name, values in zip(names, agreed.split(2), strict=True):
                self.logarithms[name].data.copy_(values)
        self._new.clear()

    def to(self, device: torch.device) -> None:
        """Move the steps, and the optimizer's state, to a device."""
        if all(logarithm.device == device for logarithm in self.logarithms.values()):
            return
        self.load_state_dict(self.state_dict(), device)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, lists and dicts only."""
        logarithms = {name: v.detach().clone() for name, v in self.logarithms.items()}
        state: dict[str, Any] = {"logarithms": logarithms, "highest_rates": dict(self._highest)}
        optimizer = self._optimizer.state_dict() if self._optimizer is not None else self._saved_optimizer
        return state if optimizer is None else {**state, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Load a saved state; may be called more than once."""
        self.logarithms = {name: v.to(device).clone().requires_grad_() for name, v in state["logarithms"].items()}
        self._optimizer, self._saved_optimizer = None, state.get("optimizer")
        self._highest = dict(state.get("highest_rates", {}))

    def clear(self) -> None:
        """Forget what was learned."""
        self.logarithms.clear()
        self._new.clear()
        self._optimizer = self._saved_optimizer = None

    def _clear(self) -> None:
        for logarithm in self.logarithms.values():
            logarithm.grad = None
