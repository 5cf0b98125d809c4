"""A run that is killed at a given moment of its end; started as a script by test_interruptions.py.

The module is trained once; then, for every moment, a forked process ends the fit and is killed there.
"""

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import Classifier, images, make_trainer, seeded

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, load, runtimes
from lightning_quant.artifact import artifact as artifacts
from lightning_quant.callbacks import finish
from lightning_quant.callbacks.base import QuantizationCallback

KINDS = {"QAT": QuantizationAwareTraining, "PTQ": PostTrainingQuantization}


def kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(owner: Any, name: str) -> Callable[[], None]:
    """Kill when a function has done its work."""

    def arrange() -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: (original(*args, **kwargs), kill())[0])

    return arrange


def at(name: str, number: int) -> Callable[[], None]:
    """Kill in place of the n-th call of a function that changes a folder."""

    def arrange() -> None:
        original, count = getattr(os, name), [0]

        def call(*args: Any, **kwargs: Any) -> None:
            count[0] += 1
            if count[0] == number:
                kill()
            original(*args, **kwargs)

        setattr(os, name, call)

    return arrange


MOMENTS: dict[str, Callable[[], None]] = {
    "weights chosen": after(QuantizationCallback, "way_back"),
    "model file staged": after(runtimes.get("onnxruntime"), "export"),
    "model file checked": after(runtimes.get("onnxruntime"), "check"),
    "version committed": at("rename", 1),
    **{f"file {number} replaced": at("replace", number) for number in range(1, 4)},
    "version settled": at("rename", 2),
    "exported": after(finish, "export"),
    "evaluated": after(finish, "_metrics"),
    "measured": after(finish, "make_report"),
    "report committed": at("rename", 3),
    **{f"file {number} replaced": at("replace", number) for number in range(4, 7)},
    "reported": after(artifacts, "add_report"),
}


class Fork(Callback):
    """Before our callback ends the fit, lets one process after the other end it and be killed there."""

    def __init__(self, folder: Path, x: torch.Tensor) -> None:
        self.folder, self.x = folder, x

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        outcomes: dict[str, Any] = {}
        old = load(self.folder)(self.x)
        for moment, arrange in MOMENTS.items():
            child = os.fork()
            if child == 0:
                # Never by the way of exit handlers, which wait for threads that a fork has not.
                try:
                    arrange()
                    trainer.callbacks[1].on_fit_end(trainer, pl_module)
                except Exception:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            new = load(self.folder)(self.x)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                raise RuntimeError(f"{moment!r} ended otherwise than by being killed")
            outcomes[moment] = {
                "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
                "result": "old" if torch.equal(new, old) else "new",
                "sum": float(new.double().sum()),
            }
        (self.folder.parent / "outcomes.json").write_text(json.dumps(outcomes))


def main(kind: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    artifact, x = folder / "artifact", images(8, seed=9).tensors[0]
    make_trainer(KINDS[kind](output_dir=artifact, evaluate=False)).fit(seeded(seed=5))
    callback = KINDS[kind](output_dir=artifact)
    saving = ModelCheckpoint(folder / "ckpt", save_last=True)
    trainer = make_trainer(Fork(artifact, x), callback, saving, max_epochs=2, enable_checkpointing=True)
    # Latencies take longer than all else that follows the moments at which it is killed.
    with mock.patch("lightning_quant.report.make_report.measure_latency", return_value=((), ())):
        trainer.fit(seeded())
    Classifier.load_from_checkpoint(saving.last_model_path, weights_only=True, strict=True)
    final = load(artifact)(x)
    outcomes = json.loads((folder / "outcomes.json").read_text())
    outcomes["finished"] = {"sum": float(final.double().sum()), "left": sorted(f.name for f in artifact.iterdir())}
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
