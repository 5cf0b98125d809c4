"""Arguments by name: one that a door does not have is answered with the one that was meant."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from lightning_quant.arguments.choice import did_you_mean
from lightning_quant.errors import QuantizationError

Door = TypeVar("Door", bound=Callable[..., Any])

# What other tools call it.
_ELSEWHERE = {
    "runtime": ("backend", "target", "target_device", "device", "execution_provider", "provider", "format"),
    "engine": ("qengine", "quantized_engine"),
    "recipe": ("bits", "dtype", "weights_dtype", "qconfig", "qconfig_dict", "config", "preset", "mode", "precision"),
    "output_dir": ("output", "output_path", "save_path", "save_dir", "path", "folder", "dirpath", "filename"),
    "calibration_data": ("calib_data", "calib_dataloader", "calibration_dataloader", "dataset", "dataloader", "data"),
    "calibration": ("num_batches", "num_calibration_batches", "calib_batches", "calibration_batches"),
    "exclude": ("ignore", "ignored_scope", "skip", "modules_to_not_convert", "modules_to_not_quantize"),
    "limits": ("max_drop", "accuracy_criterion", "tolerable_loss", "max_accuracy_drop", "constraints"),
    "evaluate": ("eval_func", "eval_fn", "validation_fn", "metric"),
    "module": ("model", "submodule", "quantize_module"),
    "trust_checkpoint": ("trust", "weights_only"),
    "dynamic_shapes": ("dynamic_axes", "input_shapes"),
}


class UnknownArgumentError(QuantizationError, TypeError):
    """A door was called with an argument that it does not have; also the error that Python raises for that."""


def known_arguments(door: Door) -> Door:
    """Have a door, a function or a class, say which argument was meant where it is called with one it does not have."""
    function: Any = door.__init__ if isinstance(door, type) else door  # type: ignore[misc]
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "self"]

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in names:
                meant = [own for own in names if name in _ELSEWHERE.get(own, ())]
                hint = f" Did you mean {meant[0]!r}?" if meant else did_you_mean(name, names)
                hint = hint or f" It has {', '.join(names)}."
                raise UnknownArgumentError(f"{door.__name__}() has no argument {name!r}.{hint}")
        return function(*args, **kwargs)

    if not isinstance(door, type):
        return called  # type: ignore[return-value]
    door.__init__ = called  # type: ignore[misc]
    return door
