"""Fits every model of a client with every recipe, and prints what came of each as a line of JSON.

Runs in the client's environment: `.clients/darts/bin/python tests/clients/run_client.py darts [MODEL ...]`.
"""

import contextlib
import importlib
import io
import json
import logging
import math
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

import lightning_quant as lq
from lightning_quant.capture.capture import isolated_rng
from lightning_quant.errors import QuantizationError
from lightning_quant.surgery.routing import clone

RECIPES = ("qat", "int8", "int8_dynamic", "int8_weight_only")


class Recorder(Callback):
    """Counts training batches, and keeps Trainer and module, which projects hide."""

    def __init__(self) -> None:
        self.num_batches, self.trainer, self.module, self.loaders = 0, None, None, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None, "module": None, "loaders": None}

    def __deepcopy__(self, memo: Any) -> "Recorder":
        return self

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.num_batches, self.trainer, self.module = self.num_batches + 1, trainer, pl_module

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        # Projects predict with the same Trainer afterwards.
        self.loaders = trainer.val_dataloaders


def fitted(model: Any, recipe: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Fit one model and say what came of it."""
    options |= {"output_dir": folder / "artifact", "limit_eval_batches": 4}
    callback = (
        lq.QuantizationAwareTraining(**options) if recipe == "qat" else lq.PostTrainingQuantization(recipe, **options)
    )
    recorder = Recorder()
    try:
        saved = model([callback, recorder], folder)
    except Exception as error:  # whatever a run may end with is what is to be found out
        cause, ours = error, False
        while cause is not None:
            ours = ours or isinstance(cause, QuantizationError) or type(cause).__name__ == "MisconfigurationException"
            cause = cause.__cause__
        where = traceback.extract_tb(error.__traceback__)[-1]
        if "CLIENT_TRACEBACK" in os.environ:
            traceback.print_exc()
        text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return {
            "outcome": "refused" if ours else "raised",
            "batches": recorder.num_batches,
            "why": " ".join(text.split()),
        }
    # Projects copy the callbacks that they are given.
    callback = next(own for own in recorder.trainer.callbacks if isinstance(own, type(callback)))
    report = callback.artifact.report
    rows = {row["name"]: row for row in report["metrics"]}
    by_hand = validated(recorder, callback)
    known = [name for name in rows if name in by_hand]
    apart = [n for n in known if not math.isclose(rows[n]["artifact"], by_hand[n], rel_tol=1e-3, abs_tol=1e-5)]
    return {
        "outcome": "artifact",
        "batches": recorder.num_batches,
        "metrics": {n: [row["float_value"], row["simulated"], row["artifact"]] for n, row in rows.items()},
        "apart": {name: by_hand[name] for name in apart},
        "coverage": report["plan"]["coverage"],
        "saved": saved,
    }


def validated(recorder: Recorder, callback: Any) -> dict[str, float]:
    """Return the project's own validation with the loaded artifact in place of its module."""
    # Projects keep attention weights and losses on their modules, which `copy.deepcopy` refuses.
    module = clone(recorder.module)
    place = module.get_submodule(callback.path)
    if callback.runtime == "torch":
        lq.load(callback.artifact.path, into=place)
    else:
        place.__dict__["forward"] = lq.load(callback.artifact.path)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    # Validations that draw random numbers draw the same ones as in the report.
    with isolated_rng(0):
        trainer = type(recorder.trainer)(accelerator="cpu", devices=1, limit_val_batches=4, **options)
        (values,) = trainer.validate(module, dataloaders=recorder.loaders, verbose=False)
    return values


def main(client: str, *names: str) -> None:
    """Print a line for every fit."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    models = importlib.import_module(f"client_{client}").MODELS
    for name in names or models:
        for recipe in RECIPES:
            result = _once(models[name], recipe)
            if result["outcome"] == "refused" and recipe.startswith("int8_"):
                # What the refusal of a recipe of layers names.
                inside = _once(models[name], recipe, runtime="torch")
                result = {**inside, "runtime": "torch"} if inside["outcome"] == "artifact" else result
            print(json.dumps({"model": name, "recipe": recipe, **result}), flush=True)


def _once(model: Any, recipe: str, **options: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        before = os.getcwd()
        os.chdir(folder)
        torch.manual_seed(0)
        result = fitted(model, recipe, Path(folder), **options)
        os.chdir(before)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
