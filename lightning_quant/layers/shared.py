"""Weights that more than one place reads: layers that are tied, and code that uses a weight beside its layer."""

from typing import Any

import torch
from torch import nn

from lightning_quant.calls.signature import leaves_of
from lightning_quant.layers.placement import placed
from lightning_quant.layers.trial import Trial
from lightning_quant.surgery.routing import evaluation_mode, without_fast_path


@torch.no_grad()
def read_beside(model: nn.Module, tried: dict[str, Trial], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Return the layers whose weights are used outside of them, too, where only the integers would be found.

    Mamba's discretization and DeBERTa's relative positions do so. Reading a shape or a type does no harm.
    """

    def fails(names: list[str]) -> bool:
        layers = {place: tried[name].layer for name in names for place in tried[name].places}
        with placed(model, layers):  # type: ignore[arg-type]
            try:
                output = model(*args, **kwargs)
            # A layer that was given another parameter for one that is stored has lost that.
            except (RuntimeError, TypeError, KeyError):
                return True
        return any(t.is_floating_point() and bool(t.isnan().any()) for t in leaves_of(output))

    def culprits(names: list[str]) -> list[str]:
        if not names or not fails(names):
            return []
        half = len(names) // 2
        return names if len(names) == 1 else culprits(names[:half]) + culprits(names[half:])

    stored = [name for name, trial in tried.items() if trial.layer is not None]
    with torch.random.fork_rng(devices=[]), evaluation_mode(model), without_fast_path():
        if not fails(stored) or fails([]):
            return []
        return culprits([name for name in stored if tried[name].layer.read_beside])  # type: ignore[union-attr]


def keep_ties(tried: dict[str, Trial]) -> None:
    """Give layers that share a weight one form of it: the form of the one that needs most bits."""
    by_weight: dict[int, list[Trial]] = {}
    for trial in tried.values():
        # Empty ones have no address.
        for weight in filter(torch.Tensor.numel, trial.weights):
            by_weight.setdefault(weight.data_ptr(), []).append(trial)
    for sharing in by_weight.values():
        neediest = max(sharing, key=lambda trial: trial.bits)
        for trial in sharing:
            if trial.bits != neediest.bits:
                trial.follow(neediest)
