"""How to make the artifact from a checkpoint when a run was cut short: lines to paste."""

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_quant import recipe as recipes
from lightning_quant.checkpoint import needs_trust

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_quant.callbacks.base import QuantizationCallback


def recovery(callback: "QuantizationCallback", trainer: "Trainer") -> str:
    """Return what to run to get the artifact from the newest checkpoint of this run, without training on."""
    checkpoint = newest_checkpoint(trainer)
    if checkpoint is None:
        return "This run has saved no checkpoint to make one from; ModelCheckpoint(save_last=True) does."
    data = _data(trainer)
    arguments = ", ".join([repr(str(checkpoint)), *data, *_options(trainer, checkpoint)])
    lines = [
        f"To make one from {checkpoint.name} without training on, with the LightningModule and the data of this run:",
        "    import lightning_quant as lq",
        f"    callback = lq.{type(callback).__name__}({_arguments(callback)})",
        f"    callback.quantize_checkpoint({arguments})",
        f"To go on training instead, with the same callback: trainer.fit({', '.join([*data, 'ckpt_path=...'])})",
    ]
    return "\n".join(lines)


def _options(trainer: "Trainer", checkpoint: Path) -> list[str]:
    """Return what else the call takes: whether the checkpoint needs trust, and what evaluation depends on."""
    trust = ["trust_checkpoint=True"] if needs_trust(checkpoint) else []
    defaults = {"limit_val_batches": 1.0, "precision": "32-true"}
    # One batch is another limit than all of them.
    given = {name: getattr(trainer, name, default) for name, default in defaults.items()}
    return trust + [f"{name}={value!r}" for name, value in given.items() if repr(value) != repr(defaults[name])]


def _data(trainer: "Trainer") -> list[str]:
    if getattr(trainer, "datamodule", None) is not None:
        return ["model", "datamodule"]
    loop = getattr(trainer, "fit_loop", None)
    if loop is None or loop._data_source.is_module():
        return ["model"]
    return ["model", "train_dataloaders=train_dataloaders", "val_dataloaders=val_dataloaders"]


def newest_checkpoint(trainer: "Trainer") -> Path | None:
    """Return the checkpoint of this run that was written last, if any is there."""
    named = [
        getattr(callback, attribute, "")
        for callback in trainer.checkpoint_callbacks
        for attribute in ("last_model_path", "best_model_path", "kth_best_model_path")
    ]
    named += [path for callback in trainer.checkpoint_callbacks for path in getattr(callback, "best_k_models", {})]
    files = [Path(path) for path in named if path and Path(path).is_file()]
    return max(files, key=lambda file: file.stat().st_mtime_ns).absolute() if files else None


def given_arguments(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what a callback is constructed with, by name, but for what is the default anyway."""
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    try:
        bound = signature.bind_partial(None, *args, **kwargs).arguments
    except TypeError:
        # The constructor says better what is wrong.
        return {}
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    return {name: value for name, value in list(bound.items())[1:] if value != defaults[name]}


def _arguments(callback: "QuantizationCallback") -> str:
    known = {"module": callback.path or None, "output_dir": callback.last_folder}
    return written(callback, callback.chosen_runtime or callback.runtime, known)


def written(callback: "QuantizationCallback", runtime: str, known: dict[str, Any]) -> str:
    """Return the arguments of the call that makes a callback, with what is known of some by now."""
    recipe: Any = callback.recipe.name
    if recipes.RECIPES.get(recipe) != callback.recipe:
        recipe = callback.recipe
    named = {**callback.given, **{name: value for name, value in known.items() if value is not None}}
    for name in ("recipe", "runtime"):
        named.pop(name, None)
    values = [repr(_plain(value)) for value in (recipe, runtime)]
    return ", ".join([*values, *(f"{name}={_plain(value)!r}" for name, value in named.items())])


def _defaults(field: "dataclasses.Field[Any]") -> tuple[Any, ...]:
    made = () if field.default_factory is dataclasses.MISSING else (field.default_factory(),)
    return (field.default, *made)


def _plain(value: Any) -> Any:
    """Return a value whose `repr` needs no import: the constructors take it as well."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        set_fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        # Defaults may be infinite, for which Python has no literal.
        return {field.name: _plain(given) for field, given in set_fields if given not in _defaults(field)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if isinstance(value, list | tuple) else value
