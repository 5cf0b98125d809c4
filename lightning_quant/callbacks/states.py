"""Which state in a checkpoint is a callback's: told by what is quantized and how, not by where the artifact goes."""

import ast
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback

from lightning_quant.doors.settings import CallbackSettings
from lightning_quant.recipe import recipe as recipes


def identity_of(settings: Any) -> dict[str, Any]:
    """Return what makes a callback's state its own, of its settings or of itself, which has them as attributes."""
    return {"recipe": recipes.get(settings.recipe).name, "module": settings.module, "runtime": settings.runtime}


def state_of(callback: Callback, settings: CallbackSettings, states: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a callback's state among those of a checkpoint; earlier versions had the folder in the key, too."""
    if callback.state_key in states:
        return states[callback.state_key]
    kind = type(callback).__name__
    matching = [
        state
        for key, state in states.items()
        if key.startswith(f"{kind}{{") and _without_folder(key.removeprefix(kind)) == identity_of(settings)
    ]
    return matching[0] if len(matching) == 1 else None


def _without_folder(text: str) -> dict[str, Any] | None:
    try:
        identity = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return {name: value for name, value in identity.items() if name != "output_dir"}
