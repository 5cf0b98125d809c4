"""Count what a training step asks of a device: tensor operations, and the bytes that they read and write.

The count runs on the CPU. Of lightning_quant it can count what runs there, or what runs on a GPU: each Triton kernel is
one operation then, carried out by plain torch for its result.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import lightning_quant
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics import kernels
from lightning_quant.numerics.fake_quantize import channel_maximum
from lightning_quant.numerics.grid import Grid

# What asks a tensor where it lies or says so anew, and makes none of its values.
_FREE = frozenset({
    "alias", "as_strided", "as_strided_", "device", "detach", "expand", "lift_fresh", "permute", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "empty",
    "empty_like", "empty_strided",
})  # fmt: skip


@dataclass
class Count:
    """Operations of one step, by name, and the bytes of what they read and write, each tensor once an operation."""

    operations: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0

    @property
    def num_operations(self) -> int:
        """Number of operations; on a GPU each is a kernel, or more."""
        return self.operations.total()

    def add(self, name: str, tensors: Sequence[Any]) -> None:
        """Count one operation on these tensors, inputs and outputs."""
        self.operations[name] += 1
        self.num_bytes += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


class _Counting(TorchDispatchMode):
    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.count.operations["read on the host"] += 1
        elif name not in _FREE:
            outputs = [t for t in tree_leaves(result) if not any(t is given for given in tree_leaves(args))]
            self.count.add(name, [*tree_leaves((args, kwargs)), *outputs])
        return result


def count(step: Callable[[], object]) -> Count:
    """Return the count of one call of a step."""
    counted = Count()
    with _Counting(counted):
        step()
    return counted


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let lightning_quant take the way of a GPU with Triton, each kernel counted as one operation."""
    before = kernels.serve, sys.modules.get("lightning_quant.numerics.triton_kernels")
    kernels.serve = lambda device, dtype: dtype in kernels._DTYPES and not torch.compiler.is_compiling()
    module: Any = SimpleNamespace(
        round_values=_round_values, pass_gradient=_pass_gradient, observe_values=_observe_values, Rows=_Rows
    )
    sys.modules["lightning_quant.numerics.triton_kernels"] = lightning_quant.numerics.triton_kernels = module  # type: ignore
    try:
        yield
    finally:
        kernels.serve = before[0]
        del lightning_quant.numerics.triton_kernels, sys.modules["lightning_quant.numerics.triton_kernels"]  # type: ignore
        if before[1] is not None:
            sys.modules["lightning_quant.numerics.triton_kernels"] = lightning_quant.numerics.triton_kernels = before[1]  # type: ignore


@contextmanager
def _kernel(name: str, *tensors: Tensor | None) -> Iterator[None]:
    mode = torch.utils._python_dispatch._get_current_dispatch_mode()
    if isinstance(mode, _Counting):
        mode.count.add(name, tensors)
    with _disable_current_modes():
        yield


def _round_values(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    row: int,
    grid: Grid,
    *,
    relu: bool,
    masks: bool,
    seen: Tensor | None,
    seen_row: int,
) -> tuple[Tensor, Tensor]:
    y, bits = torch.empty_like(x), torch.empty((x.numel() + 7) // 8 if masks else 0, dtype=torch.uint8)
    with _kernel("round_values", x, y, bits):
        scale, zero_point = scales.view(-1)[row], zero_points.view(-1)[row]
        value = x.detach().float()
        value = value.relu() if relu else value
        if seen is not None:
            _raise_to(seen[seen_row], value)
        lower = torch.zeros(()) if relu else (grid.low - zero_point - 0.5) * scale
        kept = (x.detach() > lower) & (value < (grid.high - zero_point + 0.5) * scale)
        y.copy_((value / scale).round().clamp(grid.low - zero_point, grid.high - zero_point) * scale)
    # The bits themselves lie in a tensor of bytes here, which only `_pass_gradient` reads.
    bits.kept = kept  # type: ignore[attr-defined]
    return y, bits


def _raise_to(extremes: Tensor, values: Tensor) -> None:
    extremes.copy_(torch.maximum(extremes, torch.stack([-values.min(), values.max()])))


def _pass_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    result = torch.empty_like(grad)
    with _kernel("pass_gradient", grad, mask, result):
        result.copy_(torch.where(mask.kept, grad, 0))  # type: ignore[attr-defined]
    return result


def _observe_values(x: Tensor, seen: Tensor, seen_row: int) -> None:
    with _kernel("observe_values", x):
        _raise_to(seen[seen_row], x.float())


class _Rows:
    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = weights

    def maxima(self) -> Tensor:
        with _kernel("row_maxima", *self.weights):
            return torch.cat([channel_maximum(weight) for weight in self.weights])

    def rounded(self, scales: Tensor, dtype: torch.dtype) -> list[Tensor]:
        results = [torch.empty_like(weight, dtype=dtype) for weight in self.weights]
        with _kernel("round_rows", *self.weights, *results):
            for weight, result, scale in zip(
                self.weights, results, scales.split([len(w) for w in self.weights]), strict=True
            ):
                scale = scale.view(-1, *[1] * (weight.dim() - 1))
                result.copy_((weight.float() / scale).round() * scale)
        return results


def forward_and_backward(
    model: nn.Module, x: Tensor, phase: str | None = None, dtype: torch.dtype | None = None
) -> Callable[[], None]:
    """Return forward and backward of a step: float, or prepared by lightning_quant in a phase, with known ranges.

    Args:
        model: in training mode.
        x: its input.
        phase: "observe", "fake_quantize" or "frozen"; None for float.
        dtype: of autocast; None for none.
    """
    prepared = None
    if phase is not None:
        prepared = prepare(model, (x,), recipe="int8", runtime="onnxruntime")
        prepared.attach()
        prepared.observing = True

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = model(x).float().square().mean()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    if prepared is not None and phase is not None:
        for known in ("observe", "fake_quantize", phase):
            prepared.set_phase(known)
            step()
            step()
    return step


def count_without_computing(
    build: Callable[[], nn.Module], shape: tuple[int, ...], phase: str | None, dtype: torch.dtype
) -> Count:
    """Return the count of a step on the way of a GPU at full size, with tensors that have shapes and no values.

    Args:
        build: makes the float model.
        shape: of its input.
        phase: "fake_quantize" or "frozen"; None for float.
        dtype: of autocast.
    """
    model = build().train().to(memory_format=torch.channels_last)
    prepared = None if phase is None else prepare(model, (torch.randn(2, *shape[1:]),))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    if prepared is not None and phase is not None:
        for observer in prepared.ranges.observers.values():
            observer.low, observer.high = (mode.from_tensor(torch.tensor(end)) for end in (-1.0, 1.0))
            observer.num_updates = 1
        prepared.set_phase(phase)
        prepared.attach()
        prepared.observing = True

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype):
            loss = model(images).float().square().mean()
        loss.backward()
        if prepared is not None:
            prepared.ranges.settle()
        for parameter in model.parameters():
            parameter.grad = None

    # Where weights lie is asked for, and means nothing here.
    with warnings.catch_warnings(action="ignore"), mode, as_on_a_gpu():
        images = torch.empty(shape).to(memory_format=torch.channels_last)
        step()
        return count(step)
