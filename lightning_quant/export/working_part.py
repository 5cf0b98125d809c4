"""Which part of a module a runtime takes where it does not take the whole."""

import warnings
from typing import Any

import torch
from torch import nn

from lightning_quant.calls.calls import Call
from lightning_quant.export.export import trial_export
from lightning_quant.export.prepare import prepare
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.recipe.recipe import AnyRecipe
from lightning_quant.surgery.routing import evaluation_mode, resolve

# Parts that are tried, the largest first, and the share of the weights that one has at least.
_MOST_TRIES = 3
_LEAST_SHARE = 0.1


def working_part(model: nn.Module, call: Call, recipe: AnyRecipe, runtime: str) -> tuple[str, float]:
    """Return the largest child that can be quantized and exported alone, and its share of the weights.

    Args:
        model: whose whole cannot be.
        call: of it.
        recipe: the child's.
        runtime: to export for.

    Returns:
        qualified name, and a share in (0, 1]; an empty name where none of the largest works.
    """
    whole = _num_weights(model)
    # Scripted modules take no hooks.
    children = {n: child for n, child in model.named_modules() if n and not isinstance(child, torch.jit.ScriptModule)}
    shares = {name: _num_weights(child) / max(whole, 1) for name, child in children.items()}
    calls = _first_calls(model, call, {name for name, share in shares.items() if share >= _LEAST_SHARE})
    for name in sorted(calls, key=lambda name: -shares[name])[:_MOST_TRIES]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                _try(resolve(model, name), calls[name], recipe, runtime)
            # What is told is why the whole is refused, whatever comes of a part.
            except Exception:
                continue
        return name, shares[name]
    return "", 0.0


def _try(child: nn.Module, call: Call, recipe: AnyRecipe, runtime: str) -> None:
    plan: Any = prepare if recipe.needs_calibration else quantize_layers
    trial_export(plan(child, *call, recipe=recipe, runtime=runtime))


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
