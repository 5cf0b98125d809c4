"""How many multiply-adds a call makes, and in which module: PyTorch's own counter, with what it lacks."""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_quant.calls.calls import map_tensors
from lightning_quant.surgery.routing import without_fast_path

Shape = tuple[int, ...]


@dataclass
class ObservedCall:
    """What one call of a module makes of its submodules.

    Attributes:
        first: path of every module that was called to the arguments of its first call.
        times: path to how often it was called.
        multiply_adds: path of the innermost module at work to operator to multiply-adds.
    """

    first: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    multiply_adds: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))

    @property
    def total(self) -> int:
        """Multiply-adds of the whole call."""
        return sum(sum(operators.values()) for operators in self.multiply_adds.values())

    def share(self, path: str) -> float:
        """Return the share of the multiply-adds that a module makes with all in it, in [0, 1]."""
        inside = sum(
            sum(operators.values())
            for place, operators in self.multiply_adds.items()
            if not path or place == path or place.startswith(f"{path}.")
        )
        return inside / self.total if self.total else 1.0


def observe_call(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ObservedCall:
    """Run one forward under the module's present flags and count it; buffers and attributes may change as in any."""
    # A forward may write into what it is given.
    given_args, given_kwargs = map_tensors(Tensor.clone, (args, kwargs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), counted(root) as observed:
        root(*given_args, **given_kwargs)
    observed.first[""] = args, kwargs
    return observed


class _Account:
    """Books what a counter has seen since it was last looked at on the innermost module at work."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter, self.observed = counter, ObservedCall()
        self.inside: list[str] = []
        self.before: dict[Any, int] = {}

    def book(self) -> None:
        """Book what ran since a module was last entered or left."""
        now = self.counter.get_flop_counts().get("Global", {})
        place = self.inside[-1] if self.inside else ""
        for operator, flops in now.items():
            # Of a step that differentiates on its own, the backward pass is no part of what runs later.
            if flops != self.before.get(operator, 0) and "backward" not in str(operator):
                self.observed.multiply_adds[place][_name(operator)] += (flops - self.before.get(operator, 0)) // 2
        self.before = now

    def enter(self, path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Called before the forward of a module."""
        self.book()
        self.inside.append(path)
        self.observed.first.setdefault(path, (args, kwargs))
        self.observed.times[path] += 1

    def leave(self, *_: Any) -> None:
        """Called after the forward of a module."""
        self.book()
        self.inside.pop()


@contextmanager
def counted(root: nn.Module) -> Iterator[ObservedCall]:
    """Count what the modules of a tree compute in a block; their hooks go when it ends.

    Encoders run layer by layer: their fused kernels call no layer.
    """
    account = _Account(counter := multiply_add_counter())
    handles = []
    for path, module in root.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        enter = functools.partial(account.enter, path)
        handles += [
            module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
            module.register_forward_hook(account.leave, always_call=True),
        ]
    try:
        with without_fast_path(), counter:
            yield account.observed
            account.book()
    finally:
        for handle in handles:
            handle.remove()


class _Everywhere:
    """Stands for PyTorch's tracker of modules, whose hooks on gradients `torch.autograd.grad` in a step refuses."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def multiply_add_counter() -> FlopCounterMode:
    """Return PyTorch's counter of floating point operations, two for each multiply-add, with formulas that it lacks."""
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    counter.mod_tracker = _Everywhere()  # type: ignore[assignment]
    return counter


def counted_by(counter: FlopCounterMode) -> int:
    """Return the multiply-adds that a counter has seen."""
    return counter.get_total_flops() // 2


def _name(operator: Any) -> str:
    name = str(operator).rpartition(".")[2]
    return "scaled_dot_product_attention" if "attention" in name else name.lstrip("_")


def _formulas() -> dict[Any, Any]:
    known: dict[str, Any] = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_attention_math_for_mps": _attention,
        "_scaled_dot_product_fused_attention_overrideable": _attention,
        "mkldnn_rnn_layer": _one_recurrent_layer,
        "_cudnn_rnn": _recurrent,
        "miopen_rnn": _recurrent,
        "_trilinear": _trilinear,
        "mv": _of_first,
        "dot": _of_first,
        "vdot": _of_first,
        "addmv": _of_second,
        "addbmm": _batch_of_products,
        "_addmm_activation": _product_added,
        "_int_mm": _product,
        "linear": _linear,
        "_grouped_mm": _grouped,
        "_weight_int8pack_mm": _linear,
    }
    aten = torch.ops.aten
    return {getattr(aten, name): formula for name, formula in known.items() if hasattr(aten, name)}


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _one_recurrent_layer(x: Shape, *rest: Any, **_: Any) -> int:
    """One direction of one layer: `x` is `(time, batch, features)`, its weights come first."""
    return 2 * math.prod(x[:-1]) * (math.prod(rest[0]) + math.prod(rest[1]))


def _recurrent(x: Shape, weights: list[Shape], *_: Any, **__: Any) -> int:
    """All layers at once: `x` is `(time, batch, features)` or packed `(steps, features)`."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) > 1)


def _trilinear(first: Shape, second: Shape, third: Shape, *expanded: Any, **_: Any) -> int:
    """A sum over products of three tensors, each with new dimensions where `expanded` says so."""
    shapes = []
    for shape, places in zip((first, second, third), expanded[:3], strict=True):
        sizes = list(shape)
        for place in sorted(places):
            sizes.insert(place, 1)
        shapes.append(sizes)
    return 2 * math.prod(max(sizes) for sizes in zip(*shapes, strict=True))


def _of_first(matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _of_second(_: Shape, matrix: Shape, *__: Any, **___: Any) -> int:
    return 2 * math.prod(matrix)


def _product(first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(first) * second[-1]


def _product_added(_: Shape, first: Shape, second: Shape, *__: Any, **___: Any) -> int:
    return 2 * math.prod(first) * second[-1]


_batch_of_products = _product_added


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _grouped(first: Shape, second: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Products of groups of rows, or of groups of columns where both are matrices."""
    return 2 * math.prod(first) * second[-1]
