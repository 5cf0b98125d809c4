"""Biases of stored layers: what the error of a layer's weights does to the mean of its output is taken out of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.layers.layer import plain
from lightning_quant.layers.linear import StoredLinear
from lightning_quant.layers.storage import dequantize
from lightning_quant.layers.trial import Trial
from lightning_quant.numerics.bias_correction import InputMeans, mean_shift
from lightning_quant.surgery.routing import call_watched

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def correct_biases(model: nn.Module, tried: Mapping[str, Trial], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let the means of what linear layers and convolutions answer on a call of the float model stay as they were."""
    trials = {label: trial for label, trial in tried.items() if _is_correctable(trial)}
    means = InputMeans()
    handles = [trial.float_layer.register_forward_pre_hook(_noting(means, trial)) for trial in trials.values()]
    call_watched(model, args, kwargs, handles)
    for label, mean in means.means.items():
        layer: Any = trials[label].layer
        error = dequantize(*layer.stored("weight")) - layer.rows(plain(trials[label].float_layer), "weight").detach()
        layer.add_to_bias(mean_shift(error.double(), mean))


def _is_correctable(trial: Trial) -> bool:
    layer = trial.layer
    if layer is None or layer.scheme.storage not in ("int8", "int4"):
        return False
    of_torch = any(
        isinstance(trial.float_layer, kind) and type(trial.float_layer).forward is kind.forward
        for kind in _CONVOLUTIONS
    )
    return of_torch or isinstance(layer, StoredLinear)


def _noting(means: InputMeans, trial: Trial) -> Any:
    kind = "linear" if isinstance(trial.layer, StoredLinear) else "conv"

    def note(module: Any, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        # Without a batch, the channels of a convolution come first.
        if isinstance(x, Tensor) and x.is_floating_point() and (kind == "linear" or x.dim() == module.weight.dim()):
            means.update(trial.label, kind, x)

    return note
