"""Quantize PyTorch Lightning models truthfully: one callback, an int8 model on disk, measured and logged."""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_quant.arguments.choice import did_you_mean
from lightning_quant.arguments.moved import find_moved
from lightning_quant.cli.shorthand import know_callbacks

if TYPE_CHECKING:
    from lightning_quant.artifact.artifact import Artifact, load
    from lightning_quant.artifact.signing import sign
    from lightning_quant.callbacks import (
        PostTrainingQuantization,
        QuantizationAwareTraining,
        QuantizationMonitor,
        Schedule,
    )
    from lightning_quant.cli.quantize_command import QuantizationCLI
    from lightning_quant.doors.pipeline import quantize
    from lightning_quant.measure.verification import verify
    from lightning_quant.recipe.recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "Artifact",
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "QuantizationCLI",
    "QuantizationMonitor",
    "Recipe",
    "Schedule",
    "load",
    "quantize",
    "sign",
    "verify",
]
# Loaded when first used, so that `import lightning_quant` is quick and loads neither onnx nor a runtime.
_HOMES = {
    "Artifact": "artifact.artifact",
    "PostTrainingQuantization": "callbacks",
    "QuantizationAwareTraining": "callbacks",
    "QuantizationCLI": "cli.quantize_command",
    "QuantizationMonitor": "callbacks",
    "Recipe": "recipe.recipe",
    "Schedule": "callbacks",
    "load": "artifact.artifact",
    "sign": "artifact.signing",
    "quantize": "doors.pipeline",
    "verify": "measure.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        # Python asks for many a name of its own.
        hint = "" if name.startswith("_") else did_you_mean(name, _HOMES)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}".rstrip("."))
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


find_moved()
know_callbacks()
