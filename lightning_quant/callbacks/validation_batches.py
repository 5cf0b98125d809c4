"""Batches from everywhere in the validation data: the first, the last, which is often smaller, and some between."""

import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_quant.calibrate.recalibrate import Call
from lightning_quant.callbacks.evaluation_call import rehearsed, run_validation
from lightning_quant.callbacks.training_data import _combined_loader, _transferred, _undisturbed
from lightning_quant.calls.calls import map_tensors
from lightning_quant.capture.capture import StepStoppedError
from lightning_quant.errors import CaptureError
from lightning_quant.planned.parts import check_takes
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.surgery.compilation import original_path
from lightning_quant.surgery.routing import resolve

# Calls that are recorded of one step.
_CALLS = 4


# Batches of each validation loader whose calls are looked at before training, and where Python reads values in them.
_BATCHES, _MANY_BATCHES = 4, 32


def note_sizes(model: PlannedModel, trainer: Trainer, pl_module: LightningModule, path: str) -> None:
    """Remember the sizes of the first calls that validation makes, but for those that no file can take."""
    for call in validation_calls(trainer, pl_module, path, _BATCHES):
        with suppress(CaptureError):
            model.note_sizes(*call)


def check_batches(model: PlannedModel, trainer: Trainer, pl_module: LightningModule, path: str) -> None:
    """Refuse, before training, a file that does not take the calls that validation makes.

    They are the first of each loader, and more of them where Python decides by values in them.

    Raises:
        CaptureError: there is one that it does not take.
    """
    for args, kwargs in validation_calls(trainer, pl_module, path, _MANY_BATCHES if model.decided else _BATCHES):
        check_takes(model, args, kwargs)


def validation_calls(trainer: Trainer, pl_module: LightningModule, path: str, number: int) -> list[Call]:
    """Record calls that `validation_step` makes of the module at a path, on some batches of each loader.

    Args:
        trainer: at fit start, with data attached.
        pl_module: its module; left as it is.
        path: name of the module.
        number: of batches of each loader.

    Returns:
        As many as there are until a step fails; the loop itself will tell why.
    """
    calls: list[Call] = []
    of_step = 0

    def record(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal of_step
        if of_step == _CALLS:
            raise StepStoppedError
        of_step += 1
        calls.append(map_tensors(lambda tensor: tensor.detach().clone(), (args, kwargs)))

    with rehearsed(trainer, pl_module, "validation") as duplicate:
        module = resolve(duplicate, original_path(duplicate, path))
        module.register_forward_pre_hook(record, with_kwargs=True, prepend=True)
        for batch, index, loader in spread_batches(trainer, duplicate, number):
            of_step = 0
            try:
                with trainer.precision_plugin.val_step_context():
                    run_validation(duplicate, batch, index, loader)
            except StepStoppedError:
                continue
            # A validation that does not run here, on a copy and before its time, tells nothing.
            except Exception:
                break
    return calls


def spread_batches(trainer: Trainer, pl_module: LightningModule, number: int) -> Iterator[tuple[Any, int, int]]:
    """Yield batches with their index and their loader's, evenly spread; the first ones where nobody can choose."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    combined = _combined_loader(trainer, "validation")
    if combined._mode != "sequential":
        return
    with ExitStack() as stack:
        for which, (loader, limit) in enumerate(zip(combined.flattened, loop._max_batches, strict=False)):
            probe = _undisturbed(loader, stack)
            chosen = _choose(probe, limit, number)
            taken = itertools.islice(probe, int(min(number, limit)))
            for index, batch in zip(chosen, taken, strict=False):
                yield _transferred(trainer, pl_module, batch), index, which


def _choose(probe: Any, limit: float, number: int) -> list[int]:
    """Return which batches a loader yields; one over a data set with indices is made to yield chosen ones alone."""
    is_indexed = isinstance(probe, DataLoader) and not isinstance(probe.dataset, IterableDataset)
    if not is_indexed or probe.batch_sampler is None or not math.isfinite(limit):
        return list(range(number))
    samples = list(itertools.islice(probe.batch_sampler, int(limit)))
    last = len(samples) - 1
    steps = max(min(number, len(samples)) - 1, 1)
    chosen = sorted({round(last * step / steps) for step in range(steps + 1)}) if samples else []
    probe.__dict__["batch_sampler"] = [samples[index] for index in chosen]
    return chosen
