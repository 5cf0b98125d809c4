"""Run a LightningModule's own `training_step` on batches of its own training data, and leave no trace."""

import copy
import functools
import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from lightning_quant.capture.capture import Capture, StepStoppedError, capture, isolated_rng, unchanged
from lightning_quant.errors import CalibrationError, CaptureError
from lightning_quant.graph.analyze import has_weights
from lightning_quant.measure.lent import inert_optimizers, lent_loggers, lr_schedulers
from lightning_quant.surgery.host import HOST, copied_to, device_for_search
from lightning_quant.surgery.routing import clone


def capture_call(
    trainer: Trainer,
    pl_module: LightningModule,
    path: str | None,
    example: str,
    is_wanted: Callable[[nn.Module], bool] = has_weights,
    *,
    together: bool = False,
) -> Capture:
    """Record one call of the module to quantize.

    Args:
        trainer: at fit start, with data attached.
        pl_module: its module; left as it is.
        path: name of the module to quantize, or None to find it.
        example: "example_input_array" calls the LightningModule with that; else `training_step` runs on a batch.
        is_wanted: tells whether there are layers to quantize at or under a module.
        together: take several independent modules as parts of one.
    """
    # Outside the isolation: the trainer keeps what is set up here, with the random numbers that it draws for it.
    _combined_loader(trainer, "train")
    duplicate = independent_copy(trainer, pl_module)
    with isolated_rng(), unchanged(pl_module), torch.enable_grad():
        if example == "example_input_array":
            return capture(duplicate, lambda: _call_example(duplicate), path, is_wanted)
        batch = next(iter(batches(trainer, pl_module, 1)), None)
        if batch is None:
            raise CalibrationError("Expected the train dataloader to yield a batch, but it yields none.")
        start_hooks(duplicate, batch)
        with trainer.precision_plugin.train_step_context():
            step = functools.partial(run_training_step, duplicate, batch, 0)
            return capture(duplicate, step, path, is_wanted, together=together)


@contextmanager
def borrowed_loaders(trainer: Trainer) -> Iterator[None]:
    """Let a trainer that resumes set its training data up anew after a block.

    Loops, and with them the places where loaders stood, are restored after fit start, when data is set up: what was set
    up before would begin at its first batch.
    """
    if not trainer.ckpt_path:
        yield
        return
    with isolated_rng():
        try:
            yield
        finally:
            trainer.fit_loop._combined_loader = None


def start_hooks(duplicate: LightningModule, batch: Any) -> None:
    """Run the hooks that a LightningModule may make its state in before its first `training_step`."""
    duplicate.on_fit_start()
    duplicate.on_train_start()
    duplicate.on_train_epoch_start()
    duplicate.on_train_batch_start(batch, 0)


def calibration_steps(
    trainer: Trainer, duplicate: LightningModule, num_batches: int, seed: int, data: str
) -> Iterator[Callable[[], Any]]:
    """Yield steps that run a copy of the LightningModule on batches of its data.

    Args:
        trainer: whose data is meant.
        duplicate: from `independent_copy`.
        num_batches: how many.
        seed: of shuffling, augmentation and whatever else draws random numbers.
        data: "train", or "validation" when asked for by name.
    """
    with isolated_rng(seed), unchanged(duplicate):
        for index, batch in enumerate(batches(trainer, duplicate, num_batches, data)):
            run = run_training_step if data == "train" else _run_validation_step
            yield functools.partial(_run_after_training, run, duplicate, batch, index)


def _run_after_training(run: Callable[..., Any], duplicate: LightningModule, batch: Any, index: int) -> Any:
    """Run a step of a copy; where it misses what was taken away when training ended, with that made once more."""
    try:
        return run(duplicate, batch, index)
    # Whatever the user's own step raises then.
    except Exception:
        start_hooks(duplicate, batch)
        return run(duplicate, batch, index)


def check_data(trainer: Trainer, pl_module: LightningModule, data: str, needed: int = 1, allowed: int = 1) -> None:
    """Make sure that there are batches of that data.

    Args:
        trainer: whose data is meant.
        pl_module: that takes them.
        data: "train" or "validation".
        needed: how many there must be.
        allowed: how many will be taken at most.

    Raises:
        CalibrationError: there is no loader, or it yields nothing, or too little.
    """
    _combined_loader(trainer, data)
    with isolated_rng():
        number = sum(1 for _ in batches(trainer, pl_module, min(needed, allowed), data))
    if number == 0:
        raise CalibrationError(f"Expected the {data} dataloader to yield a batch, but it yields none.")
    if number < needed:
        raise CalibrationError(
            f"Expected at least {needed} calibration batches for a recipe with accuracy steps, one of them to be held "
            "back, but got 1. Calibrate with more or smaller batches, or use recipe 'int8'."
        )


def independent_copy(trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    """Return a structural copy of a LightningModule that logs nowhere and steps no optimizer; weights are shared."""
    duplicate = clone(pl_module)
    quiet_trainer = copy.copy(trainer)
    quiet_trainer.loggers = [*lent_loggers(trainer)]
    duplicate.trainer = quiet_trainer
    for name in ("log", "log_dict", "log_grad_norm"):
        duplicate.__dict__[name] = _do_nothing
    for name in ("manual_backward", "backward", "clip_gradients"):
        duplicate.__dict__[name] = _stop
    duplicate.__dict__["optimizers"] = lambda *_, **__: inert_optimizers(trainer)
    duplicate.__dict__["lr_schedulers"] = functools.partial(lr_schedulers, trainer)
    return duplicate


def working_copy(trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    """Return an independent copy on the trainer's device, where what is exported is calibrated and searched.

    When fit has ended Lightning has moved the module that was trained to the CPU, so there is no second one there.
    """
    device = device_for_search(trainer.strategy.root_device)
    return independent_copy(trainer, pl_module if device == HOST else copied_to(pl_module, device))


def run_training_step(duplicate: LightningModule, batch: Any, index: int) -> Any:
    """Return what `training_step` of a copy does; None where it wants to use an optimizer, which ends it."""
    names = list(inspect.signature(duplicate.training_step).parameters)
    if "dataloader_iter" in names:
        raise CaptureError(
            "Expected `training_step` to take a batch, but it takes `dataloader_iter`. "
            "Use `example='example_input_array'`."
        )
    with suppress(StepStoppedError):
        return duplicate.training_step(*(batch, index)[: len(names)])
    return None


def batches(trainer: Trainer, pl_module: LightningModule, number: int, data: str = "train") -> Iterator[Any]:
    """Yield batches of the trainer's data as `training_step` would get them, without disturbing its loaders."""
    combined = _combined_loader(trainer, data)
    with ExitStack() as stack:
        loaders = pytree.tree_map(lambda loader: _undisturbed(loader, stack), combined.iterables)
        for count, (batch, _, _) in enumerate(CombinedLoader(loaders, combined._mode)):
            if count == number:
                return
            yield _transferred(trainer, pl_module, batch)


def _combined_loader(trainer: Trainer, data: str) -> CombinedLoader:
    if data == "train":
        trainer.fit_loop.setup_data()
        combined = trainer.fit_loop._combined_loader
    else:
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    if combined is None:
        limit = f"limit_{'train' if data == 'train' else 'val'}_batches"
        if getattr(trainer, limit) == 0:
            raise CalibrationError(f"Expected the run to have {data} data, but it has `{limit}=0`: 1 is enough.")
        raise CalibrationError(f"Expected the trainer to have {data} data, but there is no {data} dataloader.")
    return combined


def _undisturbed(loader: Any, stack: ExitStack) -> Any:
    """Return a loader over the same data that runs in this process and whose generators are put back."""
    if isinstance(loader, Iterator) and not _begins_anew(loader):
        raise CaptureError(
            f"Expected a dataloader that can be read more than once, but got a {type(loader).__name__}, whose batches "
            "would be missing from training. Return a DataLoader, or an object whose `__iter__` begins anew."
        )
    for owner in _owners_of_generators(loader):
        for value in vars(owner).values():
            _put_back(value, stack)
    # A loader, or a streaming data set, may count what it has yielded: the copy counts for itself.
    probe = copy.copy(loader)
    if not isinstance(loader, DataLoader):
        return probe
    if isinstance(loader.dataset, IterableDataset):
        probe.__dict__["dataset"] = copy.copy(loader.dataset)
    probe.__dict__.update(num_workers=0, prefetch_factor=None, persistent_workers=False, timeout=0, _iterator=None)
    probe.__dict__["_DataLoader__multiprocessing_context"] = None
    return probe


def _begins_anew(loader: Iterator[Any]) -> bool:
    """Tell whether a loader that is its own iterator counts for itself, so that a copy begins anew with `__iter__`.

    Loaders that cut tensors into batches are such: they know how many there are, and read from no other iterator.
    """
    return hasattr(loader, "__len__") and not any(
        isinstance(value, Iterator) for value in getattr(loader, "__dict__", {}).values()
    )


def _owners_of_generators(loader: Any) -> list[Any]:
    """Return the loader, its samplers, and its data set with those that it wraps."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    dataset: Any = getattr(loader, "dataset", None)
    while dataset is not None:
        owners.append(dataset)
        dataset = getattr(dataset, "dataset", None)
    return [owner for owner in owners if hasattr(owner, "__dict__")]


def _put_back(value: Any, stack: ExitStack) -> None:
    """Put a random generator of any kind back when the stack unwinds."""
    if isinstance(value, torch.Generator):
        stack.callback(value.set_state, value.get_state())
    elif isinstance(value, np.random.Generator):
        stack.callback(setattr, value.bit_generator, "state", value.bit_generator.state)
    elif isinstance(value, np.random.RandomState):
        stack.callback(value.set_state, value.get_state())
    elif isinstance(value, random.Random):
        stack.callback(value.setstate, value.getstate())


def _transferred(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    if next((p.dtype for p in pl_module.parameters() if p.is_floating_point()), torch.float32) == torch.float32:
        # What is calibrated is float32 in any precision of training.
        batch = apply_to_collection(
            batch, Tensor, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor
        )
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    device = next((p.device for p in pl_module.parameters()), torch.device("cpu"))
    return pl_module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=0)


def _run_validation_step(duplicate: LightningModule, batch: Any, index: int) -> None:
    names = list(inspect.signature(duplicate.validation_step).parameters)
    duplicate.validation_step(*(batch, index)[: len(names)])


def _call_example(duplicate: LightningModule) -> None:
    example = duplicate.example_input_array
    if example is None:
        raise CaptureError("Expected the LightningModule to have an `example_input_array`, but it is None.")
    device = next((p.device for p in duplicate.parameters()), torch.device("cpu"))
    example = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), example)
    if isinstance(example, dict):
        duplicate(**example)
    elif isinstance(example, tuple):
        duplicate(*example)
    else:
        duplicate(example)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _stop(*args: Any, **kwargs: Any) -> None:
    raise StepStoppedError
