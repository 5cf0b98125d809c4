"""How to make the artifact from a checkpoint when a run was cut short: lines to paste."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_quant.capture.checkpoint import needs_trust

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def recovery(callback: str, trainer: "Trainer") -> str:
    """Return what to run to get the artifact from the newest checkpoint of this run, without training on.

    Args:
        callback: the call that makes it, as Python.
        trainer: of the run.
    """
    checkpoint = newest_checkpoint(trainer)
    if checkpoint is None:
        return "This run has saved no checkpoint to make one from; ModelCheckpoint(save_last=True) does."
    data = _data(trainer)
    arguments = ", ".join([repr(str(checkpoint)), *data, *_options(trainer, checkpoint)])
    lines = [
        f"To make one from {checkpoint.name} without training on, with the LightningModule and the data of this run:",
        "    import lightning_quant as lq",
        f"    callback = lq.{callback}",
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
