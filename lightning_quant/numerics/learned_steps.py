"""Learned step sizes: the scales of the weights are trained together with them.

Source: Esser et al. 2020, arXiv:1902.08153, equations 1 to 3 and section 2.1 (the first step, 2 mean|w| / sqrt(Q)). The
logarithm of each step is what Adam moves, so that one learning rate suits steps of any size and none turns negative;
the paper's gradient scale has the same purpose and cancels in Adam.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_quant.numerics.fake_quantize import SMALLEST_SCALE, along


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


class LearnedSteps:
    """The steps of all weights of a model, and the optimizer that moves them.

    It is the quantizer's own: the user's optimizers, their states and their checkpoints stay those of the float run.

    Attributes:
        logarithms: operator to the logarithm of its steps, `(out_channels,)`.
    """

    def __init__(self, learning_rate: float) -> None:
        self.logarithms: dict[str, Tensor] = {}
        self.learning_rate = learning_rate
        # No weight decay: a step is no weight.
        self._optimizer: torch.optim.Adam | None = None
        self._saved_optimizer: dict[str, Any] | None = None

    def step_of(self, identity: str, weight: Tensor, quant_max: int) -> Tensor:
        """Return the steps of an operator's weight, `(out_channels,)`; the first time they follow from the weight."""
        if identity not in self.logarithms:
            first = 2 * weight.detach().float().abs().flatten(1).mean(1) / quant_max**0.5
            self.logarithms[identity] = first.clamp(min=SMALLEST_SCALE).log().requires_grad_()
        return self.logarithms[identity].exp()

    def update(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Move the steps by their gradients, and clear these.

        Args:
            reduce: means of a tensor over all processes; every one must call it alike.
        """
        if not self.logarithms:
            return
        names = sorted(self.logarithms)
        logarithms = [self.logarithms[name] for name in names]
        # All in one tensor: processes meet once, and an accelerator is waited for once.
        grads = torch.cat([torch.zeros_like(v) if v.grad is None else v.grad for v in logarithms])
        grads = grads if reduce is None else reduce(grads)
        for logarithm, grad in zip(logarithms, grads.split([len(v) for v in logarithms]), strict=True):
            logarithm.grad = grad
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
        self._optimizer.step()
        self._clear()

    def to(self, device: torch.device) -> None:
        """Move the steps, and the optimizer's state, to a device."""
        if all(logarithm.device == device for logarithm in self.logarithms.values()):
            return
        self.load_state_dict(self.state_dict(), device)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, lists and dicts only."""
        state: dict[str, Any] = {"logarithms": {name: v.detach().clone() for name, v in self.logarithms.items()}}
        optimizer = self._optimizer.state_dict() if self._optimizer is not None else self._saved_optimizer
        return state if optimizer is None else {**state, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Load a saved state; may be called more than once."""
        self.logarithms = {name: v.to(device).clone().requires_grad_() for name, v in state["logarithms"].items()}
        self._optimizer, self._saved_optimizer = None, state.get("optimizer")

    def _clear(self) -> None:
        for logarithm in self.logarithms.values():
            logarithm.grad = None
