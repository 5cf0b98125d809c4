"""Layers are quantized on numbers: weights that are finite, and a call that the float module answers without NaN."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_quant.errors import CalibrationError
from lightning_quant.layers.trial import Trial


@torch.no_grad()
def check_weights(trials: Mapping[str, Trial]) -> None:
    """Make sure that the weights of all layers, those that stay float among them, are finite.

    Raises:
        CalibrationError: one is not; the message names it.
    """
    for trial in trials.values():
        for name, parameter in trial.float_layer.named_parameters():
            if not parameter.is_floating_point() or parameter.is_meta or not parameter.numel():
                continue
            # Extremes tell without a copy, and sums of finite values may be infinite.
            if not all(bool(extreme.isfinite()) for extreme in parameter.detach().aminmax()):
                raise CalibrationError(
                    f"Expected finite weights to quantize, but `{name}` of {trial.names[0]!r} has NaN or infinite "
                    "values: training has diverged, or the checkpoint is damaged."
                )


def check_output(
    root: nn.Module, output: Any, names: tuple[str, ...], tensors: list[Tensor], again: Callable[[], Any]
) -> None:
    """Make sure that a float module answered a call with numbers; infinite values, as masks have them, are some.

    Args:
        root: the float module.
        output: its answer.
        names: of the call's tensors.
        tensors: of the call.
        again: makes the call once more.

    Raises:
        CalibrationError: it did not; the message says where NaN came from.
    """
    if not _has_nan(output):
        return
    source = next(
        (f"its input `{name}` has NaN" for name, tensor in zip(names, tensors, strict=True) if _has_nan(tensor)), ""
    )
    raise CalibrationError(
        f"Expected {type(root).__name__} to answer the captured call with numbers, but its float form answers NaN: "
        f"{source or _first_layer(root, again)}. Capture another call, or repair the model."
    )


def _first_layer(root: nn.Module, again: Callable[[], Any]) -> str:
    """Return in words which layer answers NaN first."""
    names: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            if not names and _has_nan(output):
                names.append(name)

        return see

    leaves = [
        (name, module) for name, module in root.named_modules() if name and not any(True for _ in module.children())
    ]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        again()
    finally:
        for handle in handles:
            handle.remove()
    return f"{names[0]!r} does first" if names else "it comes from its own forward"


def _has_nan(value: Any) -> bool:
    leaves = (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return any(bool(leaf.isnan().any()) for leaf in leaves)
