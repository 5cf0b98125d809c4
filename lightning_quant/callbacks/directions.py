"""Whether a metric is better when it is higher: what the callbacks that watch it say."""

import re
from typing import Any

# How ModelCheckpoint and EarlyStopping call their states in a checkpoint.
_WATCHED = re.compile(r"'monitor': '([^']+)', 'mode': '(min|max)'")


def watched(trainer: Any, checkpoint: dict[str, Any] | None = None) -> dict[str, bool]:
    """Return metric to whether higher is better, of those that a ModelCheckpoint or EarlyStopping watches.

    Args:
        trainer: with its callbacks.
        checkpoint: of a run whose callbacks are not those of the trainer.
    """
    modes = dict(match for state in (checkpoint or {}).get("callbacks", {}) for match in _WATCHED.findall(str(state)))
    for callback in trainer.callbacks:
        name, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        if isinstance(name, str) and mode in ("min", "max"):
            modes[name] = mode
    return {name: mode == "max" for name, mode in modes.items()}
