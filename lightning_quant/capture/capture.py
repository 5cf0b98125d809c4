"""Find the module to quantize and record one real call of it.

A step function runs on a structural clone while hooks record; weights are shared with the original, buffers and
attributes are not, so that nothing of the run is left behind.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.loss import _Loss

from lightning_quant.arguments.choice import did_you_mean
from lightning_quant.calls.calls import map_tensors
from lightning_quant.capture.together import PartCalls
from lightning_quant.errors import CaptureError
from lightning_quant.graph.analyze import has_weights
from lightning_quant.graph.counting import counted_by, multiply_add_counter
from lightning_quant.surgery.compilation import Uncompiled, original_path
from lightning_quant.surgery.routing import evaluation_mode

# Share of the multiply-adds of several modules from which one is taken for the model.
_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Capture:
    """One real call of one module.

    Attributes:
        path: qualified name of the module inside the one that was searched; empty for that one itself.
        args: positional arguments, detached copies.
        kwargs: keyword arguments, likewise.
        beside: other modules with layers to quantize that the step calls, which nobody chose and which do little.
        parts: names of the independent modules that are quantized together, as parts of the one that was searched.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    beside: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


class StepStoppedError(BaseException):
    """Ends a step that has shown enough. No `Exception`, so that no handler in user code swallows it."""


def capture(
    root: nn.Module,
    step: Callable[[], Any],
    path: str | None = None,
    is_wanted: Callable[[nn.Module], bool] = has_weights,
    *,
    together: bool = False,
) -> Capture:
    """Run a step of `root` and record the first call of a module.

    Args:
        root: the module that the step calls; a clone whose attributes may change.
        step: runs it; may raise `StepStoppedError` to end early.
        path: qualified name of the module; by default the outermost one with layers to quantize that the step calls,
            or of several the one that makes nearly all of their multiply-adds.
        is_wanted: tells whether there are layers to quantize at or under a module.
        together: take several independent modules as parts of one.

    Raises:
        CaptureError: no such module, it was not called, or several independent ones were.
    """
    if path is not None:
        find_module(root, path)
        path = original_path(root, path)
    calls = _record(root, step, path, is_wanted)
    if path is not None:
        if path not in calls:
            raise CaptureError(
                f"Expected the training step to call `module` {path!r}, but it calls {sorted(calls) or 'none'}."
            )
        return Capture(path, *calls[path])
    trainable = _trainable_only(root, list(calls))
    if not trainable:
        raise CaptureError(_none(root, is_wanted))
    if len(trainable) == 1:
        return Capture(trainable[0], *calls[trainable[0]])
    several = {name: calls[name] for name in trainable}
    work = {name: _multiply_adds(root.get_submodule(name), *call) for name, call in several.items()}
    largest = max(trainable, key=lambda name: work[name])
    if work[largest] < _NEARLY_ALL * sum(work.values()) or not work[largest]:
        if together:
            return Capture("", (PartCalls(several),), {}, parts=tuple(trainable))
        raise CaptureError(_several(root, work))
    return Capture(largest, *calls[largest], beside=tuple(name for name in trainable if name != largest))


def find_module(root: nn.Module, path: str) -> nn.Module:
    """Return the submodule of that name; the empty path is the root itself.

    Raises:
        CaptureError: there is none; the message offers the closest names.
    """
    names = [name for name, _ in root.named_modules(remove_duplicate=False)]
    if path in names:
        return root.get_submodule(path)
    # As the user's own code has it.
    hint = did_you_mean(path.removeprefix("self."), names) or f" Children are {[n for n, _ in root.named_children()]}."
    raise CaptureError(f"Expected `module` to name a module of {type(root).__name__}, but got {path!r}.{hint}")


def _none(root: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> str:
    """Say that no module was called, or why none can be."""
    expected = f"Expected {type(root).__name__} to call a module with layers to quantize in its training step, but it "
    if is_wanted(root):
        return f"{expected}calls none. Name it with `module=...`."
    owners = [m for m in root.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))]
    kinds = ", ".join(dict.fromkeys(type(module).__name__ for module in owners))
    held = f"holds its weights in {kinds}, which have no quantized form" if kinds else "has no weights"
    return f"{expected}{held}. Build it of layers that have one, such as nn.Linear and convolutions."


def _several(root: nn.Module, work: dict[str, int]) -> str:
    """Say which independent modules a step calls, how much each is of all of them, and what to type."""
    modules = {name: root.get_submodule(name) for name in work}
    sizes = {name: sum(p.numel() * p.element_size() for p in module.parameters()) for name, module in modules.items()}
    total = max(sum(work.values()), 1)
    shares = {n: f"{n!r} ({work[n] / total:.1%} of their multiply-adds, {sizes[n]:,} bytes)" for n in work}
    largest = max(work, key=lambda name: (work[name], sizes[name]))
    has_example = getattr(root, "example_input_array", None) is not None
    of_the_whole = ', or take that of the whole with `example="example_input_array"`' if has_example else ""
    return (
        f"Expected one module to quantize, but the training step calls {len(work)} independent ones: "
        f'{", ".join(shares.values())}. Choose one, `module="{largest}"` for example, with a callback and an '
        "`output_dir` for each, or call them inside one `forward`"
        f"{of_the_whole}; or take all of them in one artifact, which is loaded into the LightningModule itself, with "
        '`recipe="int8_dynamic"` or another recipe of layers, and `runtime="torch"`.'
    )


@torch.no_grad()
def _multiply_adds(module: nn.Module, args: Any, kwargs: Any) -> int:
    with isolated_rng(), evaluation_mode(module), multiply_add_counter() as counter:
        module(*args, **kwargs)
    return counted_by(counter)


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Give Python's, NumPy's and torch's generators back as they were; inside, they start from `seed` when given."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Give the parameters of a module, which clones share, their gradients and `requires_grad` back."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in root.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _record(
    root: nn.Module, step: Callable[[], Any], path: str | None, is_wanted: Callable[[nn.Module], bool]
) -> dict[str, tuple[Any, Any]]:
    calls: dict[str, tuple[Any, Any]] = {}
    active: list[str] = []

    def enter(name: str, args: Any, kwargs: Any) -> None:
        if not active and name not in calls:
            calls[name] = map_tensors(lambda tensor: tensor.detach().clone(), (args, kwargs))
            if name == path:
                raise StepStoppedError
        active.append(name)

    def leave() -> None:
        active.pop()

    scoring = [name for name, module in root.named_modules() if _is_scoring(module)]
    handles = []
    for name, module in root.named_modules():
        wanted = name == path if path is not None else is_wanted(module) and _may_be_candidate(name, module, scoring)
        if wanted:
            handles += [
                module.register_forward_pre_hook(
                    lambda _, a, k, n=name: enter(n, a, k), with_kwargs=True, prepend=True
                ),
                module.register_forward_hook(lambda *_: leave(), always_call=True),
            ]
    try:
        step()
    except StepStoppedError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _may_be_candidate(name: str, module: nn.Module, scoring: list[str]) -> bool:
    return not isinstance(module, Uncompiled) and not _is_inside(name, scoring)


def _is_inside(name: str, others: list[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in others)


def _is_scoring(module: nn.Module) -> bool:
    # Takes a second to import, which those who look for nothing need not wait for.
    from torchmetrics import Metric, MetricCollection

    return isinstance(module, Metric | MetricCollection | _Loss)


def _trainable_only(root: nn.Module, names: list[str]) -> list[str]:
    """Leave out frozen modules, such as teachers and perceptual losses, beside modules that learn."""
    learning = [name for name in names if any(p.requires_grad for p in root.get_submodule(name).parameters())]
    return learning or names
