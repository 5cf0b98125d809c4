"""Which part of a module a runtime takes where it does not take the whole."""

import warnings
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from lightning_quant.calls.calls import Call
from lightning_quant.export.export import trial_export
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection, matches
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.recipe.recipe import AnyRecipe
from lightning_quant.surgery.routing import evaluation_mode, resolve

# Parts that are tried, the largest first, and the share of the weights that one has at least.
_MOST_TRIES = 3
_LEAST_SHARE = 0.1


@dataclass(frozen=True)
class WorkingPart:
    """A child that can be quantized and exported alone.

    Attributes:
        name: qualified.
        share: of the module's weights, in (0, 1].
        patterns: arguments whose patterns are other ones where the child is quantized alone, as code; empty for none.
    """

    name: str
    share: float
    patterns: str = ""


def working_part(
    model: nn.Module, call: Call, recipe: AnyRecipe, runtime: str, selection: Selection | None = None
) -> WorkingPart | None:
    """Return the largest child that can be quantized and exported alone; None where none of the largest works.

    Args:
        model: whose whole cannot be.
        call: of it.
        recipe: the child's, with the overrides of the whole.
        runtime: to export for.
        selection: what of the whole may be quantized; everything by default.
    """
    selection = selection or Selection()
    whole = _num_weights(model)
    # Scripted modules take no hooks.
    children = {n: child for n, child in model.named_modules() if n and not isinstance(child, torch.jit.ScriptModule)}
    shares = {
        name: _num_weights(child) / max(whole, 1)
        for name, child in children.items()
        if not any(matches(pattern, name, type(child).__name__) for pattern in selection.exclude)
    }
    calls = _first_calls(model, call, {name for name, share in shares.items() if share >= _LEAST_SHARE})
    for name in sorted(calls, key=lambda name: -shares[name])[:_MOST_TRIES]:
        own = Selection(_inside(model, name, selection.include), _inside(model, name, selection.exclude))
        overrides = {p: to for pattern, to in recipe.overrides.items() for p in _inside(model, name, (pattern,))}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                _try(children[name], calls[name], replace(recipe, overrides=overrides), runtime, own)
            # What is told is why the whole is refused, whatever comes of a part.
            except Exception:
                continue
        before = {"include": selection.include, "exclude": selection.exclude, "recipe.overrides": recipe.overrides}
        after = {"include": own.include, "exclude": own.exclude, "recipe.overrides": overrides}
        changed = (f", {key}={after[key]!r}" for key, value in before.items() if after[key] != value)
        return WorkingPart(name, shares[name], "".join(changed))
    return None


def _inside(model: nn.Module, name: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Return patterns on names and types of a module as patterns of one of its children, where they name any there."""
    child = model.get_submodule(name)
    inner = [(path, type(module).__name__) for path, module in child.named_modules() if path]
    kept: list[str] = []
    for pattern in patterns:
        if matches(pattern, name, type(child).__name__):
            kept.append("*")
        elif pattern.startswith(f"{name}."):
            kept.append(pattern.removeprefix(f"{name}."))
        elif any(fnmatchcase(kind, pattern) for _, kind in inner):
            kept.append(pattern)
        else:
            kept += [path for path, kind in inner if matches(pattern, f"{name}.{path}", kind)]
    return tuple(dict.fromkeys(kept))


def _try(child: nn.Module, call: Call, recipe: AnyRecipe, runtime: str, selection: Selection) -> None:
    plan: Any = prepare if recipe.needs_calibration else quantize_layers
    trial_export(plan(child, *call, recipe=recipe, runtime=runtime, selection=selection))


def _first_calls(model: nn.Module, call: Call, names: set[str]) -> dict[str, Call]:
    """Return the first call that each child gets within a call of the module."""
    calls: dict[str, Call] = {}

    def watch(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, Call(args, kwargs).detached())

        return resolve(model, name).register_forward_pre_hook(note, with_kwargs=True)

    handles = [watch(name) for name in names]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluation_mode(model):
            model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
