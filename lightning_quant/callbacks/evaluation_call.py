"""The call that validation makes of the module to quantize: it is the one that an artifact has to answer."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_quant.callbacks.training_data import _combined_loader, batches, independent_copy
from lightning_quant.calls.calls import flatten_call
from lightning_quant.capture.capture import Capture, capture, isolated_rng, unchanged
from lightning_quant.graph.analyze import has_weights, own_signature
from lightning_quant.surgery.routing import evaluation_mode, resolve


def evaluation_call(
    trainer: Trainer, pl_module: LightningModule, path: str | None, is_wanted: Callable[[nn.Module], bool] = has_weights
) -> Capture | None:
    """Record the first call that `validation_step` makes of a module, or of the one that it is found to call.

    Args:
        trainer: at fit start.
        pl_module: its module.
        path: as for `capture`, and so is `is_wanted`.
        is_wanted: see there.

    Returns:
        None where there is no validation, or none that calls the module.
    """
    if not trainer.enable_validation:
        return None
    with rehearsed(trainer, pl_module, "validation") as duplicate:
        for batch in batches(trainer, pl_module, 1, "validation"):
            try:
                with trainer.precision_plugin.val_step_context():
                    captured = capture(duplicate, functools.partial(run_validation, duplicate, batch), path, is_wanted)
                # A call with what no file can take, keys and values of a generation say, is not the one to export.
                flatten_call(own_signature(resolve(duplicate, captured.path)), captured.args, captured.kwargs)
                return captured
            # It calls no such module. Or it does not run here, on a copy and before its time, which tells nothing; the
            # loop itself will.
            except Exception:
                return None
    return None


def part_that_validation_calls(
    trainer: Trainer, pl_module: LightningModule, path: str, is_wanted: Callable[[nn.Module], bool]
) -> str | None:
    """Return the name of the module inside another, with all its weights, that `validation_step` calls past that.

    Args:
        trainer: at fit start.
        pl_module: its module.
        path: of the module that training calls.
        is_wanted: tells whether there are layers to quantize at or under a module.

    Returns:
        None where validation calls no such module, or none is known.
    """
    captured = evaluation_call(trainer, pl_module, None, is_wanted)
    if captured is None:
        return None
    outer, inner = (
        {id(p) for p in resolve(pl_module, name).parameters() if p.dim() > 1} for name in (path, captured.path)
    )
    return captured.path if inner == outer else None


@contextmanager
def rehearsed(trainer: Trainer, pl_module: LightningModule, data: str) -> Iterator[LightningModule]:
    """Lend a copy of a module to try its evaluation on, before its time: the module and its random numbers stay.

    Args:
        trainer: at fit start.
        pl_module: its module.
        data: "train" or "validation", whose loaders are set up.
    """
    # Outside the isolation: the trainer keeps what is set up here, with the random numbers that it draws for it.
    _combined_loader(trainer, data)
    duplicate = independent_copy(trainer, pl_module)
    with isolated_rng(), unchanged(pl_module), torch.no_grad(), evaluation_mode(duplicate):
        yield duplicate


def difference(module: nn.Module, training: Capture, evaluation: Capture, than: str = "training") -> str:
    """Return in words how two calls differ beside their tensors; empty when one graph serves both.

    Args:
        module: that is called.
        training: the call that is known, of training say.
        evaluation: the call that may differ.
        than: what the known one is, in words.
    """
    signature = own_signature(module)
    specs = [flatten_call(signature, call.args, call.kwargs)[0] for call in (training, evaluation)]
    if specs[0].key() == specs[1].key():
        return ""
    bound = []
    for call in (training, evaluation):
        arguments = signature.bind(*call.args, **call.kwargs)
        arguments.apply_defaults()
        bound.append(arguments.arguments)
    return " and ".join(
        f"`{name}` is {_in_words(bound[1].get(name))} where {than} has {_in_words(bound[0].get(name))}"
        for name in signature.parameters
        if not _alike(bound[0].get(name), bound[1].get(name))
    )


def run_validation(duplicate: LightningModule, batch: Any, index: int = 0, loader: int = 0) -> None:
    """Run `validation_step` of a copy on a batch, by default as the first of an epoch."""
    duplicate.on_validation_start()
    duplicate.on_validation_epoch_start()
    duplicate.on_validation_batch_start(batch, index, loader)
    names = list(inspect.signature(duplicate.validation_step).parameters)
    duplicate.validation_step(*(batch, index, loader)[: len(names)])


def _alike(first: Any, second: Any) -> bool:
    signature = inspect.signature(lambda value: None)
    return flatten_call(signature, (first,), {})[0].key() == flatten_call(signature, (second,), {})[0].key()


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a tensor"
    return (
        repr(value)
        if value is None or isinstance(value, bool | int | float | str)
        else f"another {type(value).__name__}"
    )
