"""What a validation loop logs, read from Lightning's own records of it."""

import pickle
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_quant.measure.attempts import noting
from lightning_quant.measure.contributions import Contributions
from lightning_quant.measure.evaluate_shares import Share
from lightning_quant.measure.interim import Interim
from lightning_quant.measure.recorder import Recorder


class LoggedValues(Callback):
    """Keeps what the validation loop of one process logged, with the number of samples behind each mean.

    Args:
        recorder: notes what each batch adds.
        interim: looks at that as it goes.
    """

    def __init__(self, recorder: Recorder | None = None, interim: Interim | None = None) -> None:
        self.values: dict[str, Share] = {}
        self.higher_is_better: dict[str, bool] = {}
        self.draws = False
        self._before: Any = None
        self._recorder, self._logged, self._unread = recorder, dict[str, Any](), list[str]()
        self._interim, self._num_batches = interim, 0

    def on_validation_batch_start(self, *_: Any) -> None:
        """Called when a validation step begins: see where the random numbers are."""
        self._before = _random_states()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Called when a validation step ends: see whether it drew some, and what it added to the metrics."""
        self.draws = self.draws or self._before != _random_states()
        if self._recorder is not None:
            modules = pl_module.named_modules()
            with noting(self._unread, "contributions of batches are"):
                self._recorder.note(logged_in(trainer), {n: m for n, m in modules if isinstance(m, Metric)}, batch)
                self._look(self._recorder)
            self._recorder = None if self._unread else self._recorder

    def _look(self, recorder: Recorder) -> None:
        self._num_batches += 1
        if self._interim is not None:
            known = self._interim.floating.contributions
            self._interim.look(self._num_batches, lambda: recorder.so_far(known))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation ends: read the results before they are reset."""
        self._logged = logged_in(trainer)
        for name, item in self._logged.items():
            higher_is_better = None if item.is_tensor else getattr(item.value, "higher_is_better", None)
            if higher_is_better is not None:
                self.higher_is_better[name] = bool(higher_is_better)
            if (share := share_of(item)) is not None:
                self.values[name] = share

    def contributions(self, values: Mapping[str, float]) -> dict[str, Contributions]:
        """Return the parts of what was logged, where they make up its value."""
        by_name: dict[str, Contributions | None] = {}
        if self._recorder is None:
            return {}
        for name, value in values.items():
            item = self._logged.get(name)
            metric = None if item is None or item.is_tensor else item.value
            with noting(self._unread, "contributions of batches are"):
                by_name[name] = self._recorder.contributions(name, value, metric)
        return {name: parts for name, parts in by_name.items() if parts is not None}


def share_of(item: Any) -> Share | None:
    """Return what one of Lightning's records has of this process's data; None where that is no single number."""
    value, number, how = item.compute(), 1.0, "same"
    if item.is_tensor and not item.meta.sync.should:
        how = next(h for h in ("mean", "max", "min", "sum") if getattr(item.meta, f"is_{h}_reduction"))
        number = float(item.cumulated_batch_size) if how == "mean" else 1.0
    return Share(float(value), number, how) if isinstance(value, Tensor) and value.numel() == 1 else None


def logged_in(trainer: Trainer) -> dict[str, Any]:
    """Return name to Lightning's record of what was logged for the whole of a validation epoch."""
    results, logged = trainer._results, {}
    for item in () if results is None else results.values():
        if item.has_reset or not item.meta.on_epoch:
            continue
        suffix = item.meta.dataloader_idx if item.meta.add_dataloader_idx else None
        logged[item.meta.forked_name(False) + (f"/dataloader_idx_{suffix}" if suffix is not None else "")] = item
    return logged


def _random_states() -> tuple[Any, ...]:
    """Return where the generators are that a step may draw from, comparable."""
    on_device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else torch.empty(0)
    tensors = tuple(state.numpy().tobytes() for state in (torch.get_rng_state(), on_device))
    return *tensors, pickle.dumps((random.getstate(), np.random.get_state()))
