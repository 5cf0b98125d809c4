"""Each layer of a module in the scheme of a recipe, on trial: what one call shows of it, and why it stays float."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lightning_quant.calls.calls import Call
from lightning_quant.graph.table import Selection
from lightning_quant.layers.finite import check_weights
from lightning_quant.layers.shared import keep_ties, read_beside
from lightning_quant.layers.trial import Trial, trials
from lightning_quant.recipe.recipe import LayerRecipe
from lightning_quant.surgery.routing import call_watched


def try_layers(
    model: nn.Module,
    call: Call,
    recipe: LayerRecipe,
    selection: Selection,
    *,
    half_arithmetic: bool,
    parts: Collection[str] = (),
    only: frozenset[str] | None = None,
) -> dict[str, Trial]:
    """Try the layers of a module in one call, and return the trials by the layers' names; the module stays as it was.

    Args:
        model: the float module, on the CPU.
        call: a real call of it.
        recipe: schemes and how close to float they must be.
        selection: patterns of layers to include and exclude.
        half_arithmetic: whether the runtime computes half precision in half precision.
        parts: names of the modules that a training step calls one by one, where it calls no whole.
        only: names of the layers to try, where something else takes care of the others.

    Raises:
        CalibrationError: a weight of a layer is not finite.
    """
    tried = trials(model, recipe, selection, call, half_arithmetic=half_arithmetic)
    for trial in tried.values():
        if parts and not any(f"{trial.place}.".startswith(f"{name}.") for name in parts):
            trial.stay_float("the training step does not call it, or it does not learn")
    if only is not None:
        tried = {label: trial for label, trial in tried.items() if label in only}
    check_weights(tried)
    _run(model, list(tried.values()), *call)
    for trial in tried.values():
        trial.finish()
    keep_ties(tried)
    for name in read_beside(model, tried, *call):
        tried[name].open_weights("code outside it reads its weight", half_arithmetic=half_arithmetic)
    keep_ties(tried)
    return tried


@torch.no_grad()
def _run(model: nn.Module, tried: list[Trial], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call the float model once; every layer's trial sees what the layer reads and answers."""
    # Before the user's hooks, which may change what the layer answers.
    handles = [
        trial.float_layer.register_forward_hook(trial.see, with_kwargs=True, prepend=True)
        for trial in tried
        if not isinstance(trial.float_layer, torch.jit.ScriptModule)
    ]
    call_watched(model, args, kwargs, handles)
