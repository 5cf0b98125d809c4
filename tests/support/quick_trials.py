"""Fits that try a module's export for which another fit of the same process has tried just that, once."""

import copy
import functools
import hashlib
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.planned.planned_model import PlannedModel

# Whether a test changes something that trials may meet: then each is a real one.
for_real = False
_LARGEST = 300
_passed: dict[Hashable, tuple[Any, Any]] = {}


@functools.cache
def make_trials_quick() -> None:
    """Let a fit know what the trial of an equal module found; trials that fail are not remembered."""
    try_export = QuantizationCallback._try_export

    def tried(callback: QuantizationCallback, model: PlannedModel) -> tuple[Any, ...]:
        # Limits that are searched are also held against what the trial wrote.
        key = None if for_real or callback.settings.searches else _key(callback, model)
        if key is None or key not in _passed:
            found = try_export(callback, model)
            if key is not None:
                if len(_passed) == _LARGEST:
                    del _passed[next(iter(_passed))]
                _passed[key] = copy.deepcopy((model.varying, found))
            return found
        model.varying, found = copy.deepcopy(_passed[key])
        return found

    QuantizationCallback._try_export = tried  # type: ignore[method-assign]


def _key(callback: QuantizationCallback, model: PlannedModel) -> Hashable | None:
    """Return all that a trial depends on: code, weights, plan, call, and what the callback asks for."""
    settings = callback.settings
    tensors = (*model.root.state_dict().values(), *model.tensors)
    if model.parts or not all(isinstance(t, Tensor) and t.device.type == "cpu" for t in tensors):
        return None
    asked = settings.dynamic_shapes, settings.engine, model.recipe, model.plan, model.captured.spec, model.varying
    return str(asked), str(model.found_sizes()), torch.is_autocast_enabled("cpu"), _code(model.root), _content(tensors)


def _code(root: nn.Module) -> Hashable:
    """Return which code runs, and with which plain attributes, in every module of a tree."""
    return tuple(
        (
            name,
            type(child),
            type(child).forward,
            vars(child).get("forward"),
            child.training,
            _plain(child),
            _hooks(child),
        )
        for name, child in root.named_modules()
    )


def _plain(module: nn.Module) -> Hashable:
    kept = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | tuple | list)}
    return str(sorted(kept.items()))


def _hooks(module: nn.Module) -> Hashable:
    return tuple(id(hook) for hooks in (module._forward_hooks, module._forward_pre_hooks) for hook in hooks.values())


def _content(tensors: tuple[Tensor, ...]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
