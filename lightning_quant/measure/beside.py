"""The user's own validation on another model beside the run's: the same batches, and the same random numbers."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_quant.calls.structures import register_structures
from lightning_quant.capture.capture import isolated_rng
from lightning_quant.measure.evaluate_shares import Share
from lightning_quant.measure.logged_values import logged_in, share_of
from lightning_quant.surgery.host import copied_to
from lightning_quant.surgery.routing import resolve


class Beside:
    """Runs a copy of a LightningModule on each batch that a run validates on, just before the run does.

    The copy logs into records of its own. Nothing is read twice: loaders, samplers and whatever draws random numbers in
    a data set know nothing of it.

    Attributes:
        pl_module: the copy, in float32, with every forward its own, which may be routed before the first batch.
        num_calls: how often validation has called the module at `path` by now.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, path: str, device: torch.device) -> None:
        """Copy a module in the state in which its validation stands.

        Args:
            trainer: whose validation is run; its records and loggers see nothing of the copy.
            pl_module: left as it is; parameters are shared.
            path: name of the module whose calls are counted.
            device: where the copy is to run.
        """
        self.pl_module: LightningModule = copied_to(pl_module, device, unrouted=True)
        # Lightning's cache of metrics by id, which a copy must not inherit.
        self.pl_module._metric_attributes = None
        self._trainer = _with_own_records(trainer)
        self.pl_module.trainer = self._trainer
        self._device, self.num_calls = device, 0
        # The copy is in float32, and so is what it reads: contexts of such precisions make tensors of another type.
        self._is_other = str(trainer.precision).endswith("-true") and trainer.precision != "32-true"
        resolve(self.pl_module, path).register_forward_pre_hook(self._count)
        self._loader: int | None = None

    def run(self, batch: Any, index: int, loader: int) -> None:
        """Run the copy's validation step and its hooks on a batch, which is left as it is."""
        loop = self._trainer.fit_loop.epoch_loop.val_loop
        if self._loader not in (None, loader):
            self._close_loader()
        self._loader = loader
        number = loader if loop._is_sequential and loop.num_dataloaders > 1 else None
        given = _copied(batch, self._device, in_float32=self._is_other)
        self._trainer._logger_connector.on_batch_start(given, number)
        arguments = loop._build_kwargs(given, index, number)
        with isolated_rng():
            self._call("on_validation_batch_start", *arguments.values())
            with self._precision():
                step = loop._build_step_args_from_hook_kwargs(arguments, "validation_step")
                output = self._call("validation_step", *step)
            self._call("on_validation_batch_end", output, *arguments.values())
        records = self._trainer._results
        if records is not None:
            records.batch = records.batch_size = None

    def end(self) -> dict[str, Share]:
        """Run what the copy does at the end of its validation, and return what it has logged."""
        connector = self._trainer._logger_connector
        self._close_loader()
        connector._evaluation_epoch_end()
        with isolated_rng():
            self._call("on_validation_epoch_end")
        return {name: share for name, item in logged_in(self._trainer).items() if (share := share_of(item)) is not None}

    def _close_loader(self) -> None:
        """Compute what was logged for a loader when its last batch is through, as Lightning does."""
        self._trainer._logger_connector.epoch_end_reached()
        self._trainer._logger_connector.update_eval_epoch_metrics()

    def _precision(self) -> Any:
        return nullcontext() if self._is_other else self._trainer.precision_plugin.val_step_context()

    def _call(self, hook: str, *args: Any) -> Any:
        self.pl_module._current_fx_name = hook
        return getattr(self.pl_module, hook)(*args)

    def _count(self, *_: Any) -> None:
        self.num_calls += 1


def _with_own_records(trainer: Trainer) -> Trainer:
    """Return a Trainer in the same place of the same run, with nothing logged as yet and no logger to send it to."""
    own = copy.copy(trainer)
    own.fit_loop = copy.copy(trainer.fit_loop)
    own.fit_loop.epoch_loop = copy.copy(trainer.fit_loop.epoch_loop)
    loop = own.fit_loop.epoch_loop.val_loop = copy.copy(trainer.fit_loop.epoch_loop.val_loop)
    loop._results = type(loop._results)(training=False)
    connector = own._logger_connector = copy.copy(trainer._logger_connector)
    connector.trainer = own
    for name in ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics"):
        setattr(connector, name, dict(getattr(connector, name)))
    connector._first_loop_iter = connector._current_fx = None
    own.loggers = [DummyLogger()]
    return own


def _copied(batch: Any, device: torch.device, *, in_float32: bool) -> Any:
    """Return a batch on a device that a step may change; what is no tensor is copied where it can be."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            kind = torch.float32 if in_float32 and value.is_floating_point() else value.dtype
            return value.detach().to(device, kind, copy=True)
        try:
            return copy.deepcopy(value)
        except TypeError:  # as of a lock or a generator
            return value

    register_structures(batch)
    return pytree.tree_map(leaf, batch)
