"""How to make the artifact from a checkpoint when a run was cut short: lines to paste."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_quant import recipe as recipes
from lightning_quant.engines import AUTO

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_quant.callbacks.base import QuantizationCallback


def recovery(callback: "QuantizationCallback", trainer: "Trainer") -> str:
    """Return what to run to get the artifact from the newest checkpoint of this run, without training on."""
    checkpoint = newest_checkpoint(trainer)
    if checkpoint is None:
        return "This run has saved no checkpoint to make one from; ModelCheckpoint(save_last=True) does."
    lines = [
        f"To make one from {checkpoint.name} without training on, with the LightningModule and the data of this run:",
        "    import lightning_quant as lq",
        f"    callback = lq.{type(callback).__name__}({_arguments(callback)})",
        f"    callback.quantize_checkpoint({str(checkpoint)!r}, model, datamodule)",
        "To go on training instead: trainer.fit(model, datamodule, ckpt_path=...) with the same callback.",
    ]
    return "\n".join(lines)


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


def _arguments(callback: "QuantizationCallback") -> str:
    recipe: Any = callback.recipe.name
    if recipes.RECIPES.get(recipe) != callback.recipe:
        recipe = dataclasses.asdict(callback.recipe)
    given: dict[str, Any] = {
        "module": callback.path or None,
        "output_dir": str(callback.last_folder),
        "include": list(callback.selection.include) if callback.selection.include != ("*",) else None,
        "exclude": list(callback.selection.exclude) or None,
        "dynamic_shapes": callback.dynamic_shapes,
        "engine": callback.engine if callback.engine != AUTO else None,
    }
    named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
    return ", ".join([repr(recipe), repr(callback.chosen_runtime or callback.runtime), *named])
