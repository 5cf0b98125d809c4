"""A callback in one line: what it was given, as it would be written."""

import inspect
from typing import TYPE_CHECKING, Any

from lightning_quant import recipe as recipes

if TYPE_CHECKING:
    from lightning_quant.callbacks.base import QuantizationCallback


def described(callback: "QuantizationCallback") -> str:
    """Return the call that makes the callback, without arguments that are as by default."""
    named: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(callback).__init__).parameters.items():
        holder = callback.selection if name in ("include", "exclude") else callback
        value = getattr(holder, name, parameter.default)
        if parameter.kind is parameter.KEYWORD_ONLY and value != _default(callback, name, parameter.default):
            named[name] = list(value) if isinstance(value, tuple) else value
    recipe: Any = callback.recipe
    shown = recipe.name if recipes.RECIPES.get(recipe.name) == recipe else recipe
    arguments = [repr(shown), repr(callback.runtime), *(f"{name}={value!r}" for name, value in named.items())]
    return f"{type(callback).__name__}({', '.join(arguments)})"


def _default(callback: "QuantizationCallback", name: str, written: Any) -> Any:
    """Return what an argument becomes when it is left out: None stands for a whole schedule or calibration."""
    kept = getattr(callback, name, None)
    return type(kept)() if kept is not None and name in ("schedule", "calibration") else written
