"""A module with the weights of a Lightning checkpoint, without a Trainer."""

import os
from typing import Any

import torch
from torch import nn

from lightning_quant.errors import QuantizationError
from lightning_quant.routing import resolve


def load_module(
    ckpt_path: str | os.PathLike[str], lightning_module: nn.Module | type[nn.Module] | None, module: str | None = None
) -> nn.Module:
    """Return the LightningModule of a checkpoint, or a module inside it.

    Args:
        ckpt_path: any checkpoint of it.
        lightning_module: its class, which is built from the hyperparameters that the checkpoint has saved; or an
            instance, which gets the weights.
        module: qualified name of a module inside it.

    Raises:
        QuantizationError: there is no such file, class or module, or the weights are those of another one.
    """
    if lightning_module is None:
        raise QuantizationError(
            "Expected `lightning_module` to be the LightningModule of the checkpoint, its class or an instance, but "
            "got None."
        )
    try:
        # Saved by the user's own run: its hyperparameters may be of any class.
        if isinstance(lightning_module, type):
            build: Any = lightning_module
            loaded = build.load_from_checkpoint(ckpt_path, map_location="cpu", weights_only=False)
        else:
            loaded = lightning_module
            loaded.load_state_dict(torch.load(ckpt_path, map_location="cpu", weights_only=False)["state_dict"])
        return resolve(loaded, module or "").eval()
    except (OSError, RuntimeError, AttributeError, LookupError, TypeError) as error:
        raise QuantizationError(
            f"Expected {os.fspath(ckpt_path)} to be a checkpoint of {lightning_module!r:.80}"
            f"{f' with a module {module!r}' if module else ''}, but {error}."
        ) from error
