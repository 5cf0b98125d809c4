"""What is exported when fit has ended: the last weights or the best ones, and what is known of them by then."""

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.scored_validation import prefix_of
from lightning_quant.callbacks.states import state_of
from lightning_quant.callbacks.unplanned import stale
from lightning_quant.calls.calls import Call
from lightning_quant.measure.attempts import noting
from lightning_quant.measure.changed_predictions import Predictions
from lightning_quant.measure.contributions import Metrics
from lightning_quant.measure.output_noise import HeldOut
from lightning_quant.measure.sensitivity import Sensitivity
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.report.section import Section
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.host import HOST, copied_to
from lightning_quant.surgery.routing import clone, resolve


@dataclass
class Known:
    """What a search has measured by now, which is not measured again.

    Attributes:
        floating: metrics of the float weights.
        calls: the first call that their validation made of the module.
        files: metrics by `model_digest` of an artifact, with the number of samples where that is known.
        predictions: what the float weights predicted meanwhile, where that was noted.
        missing: why there are no metrics of the float weights, where that failed.
    """

    floating: Metrics
    calls: list[Call] = field(default_factory=list)
    files: dict[str, tuple[Metrics, int | None]] = field(default_factory=dict)
    predictions: Predictions | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Deployment:
    """The weights to export.

    Attributes:
        pl_module: an independent copy of the LightningModule with these weights in float32.
        model: the planned model over its module.
        checkpoint: the checkpoint file that the weights come from or that training wrote last, if any.
        notes: what the report should say of the choice.
        sensitivity: which operator costs what, where that was asked for.
        held: a call that took no part in the choice of ranges, where there is one.
        known: what was measured by now.
        search: how the model was found, where it was.
        scored: these and other weights of the training, where their files were compared.
        kept_buffers: those of the module as training left it, where the file has others.
    """

    pl_module: LightningModule
    model: PlannedModel
    checkpoint: Path | None
    notes: tuple[str, ...]
    sensitivity: Sensitivity | None = None
    held: HeldOut | None = None
    known: Known | None = None
    search: Section | None = None
    scored: Section | None = None
    kept_buffers: dict[str, Tensor] | None = None

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """Let the module be as training left it while a block runs: what files are compared with is what users have."""
        buffers = dict(self.model.root.named_buffers()) if self.kept_buffers is not None else {}
        measured = {name: buffer.clone() for name, buffer in buffers.items()}
        write_buffers(self.model.root, self.kept_buffers or {})
        try:
            yield
        finally:
            write_buffers(self.model.root, measured)


def write_buffers(root: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give buffers of a module other values, on whatever device these are."""
    for name, buffer in root.named_buffers():
        if name in values:
            buffer.copy_(values[name])


def choose_weights(
    callback: QuantizationCallback,
    trainer: Trainer,
    pl_module: LightningModule,
    *,
    with_ranges: bool,
    weights: str | None = None,
) -> Deployment:
    """Copy the last or the best weights, as the callback's `weights` say unless told otherwise.

    With `with_ranges`, the ranges come from the same checkpoint file.
    """
    duplicate = clone(pl_module, unrouted=True)
    model = callback.require_prepared()
    checkpoint = _existing(_best_path(trainer) or _last_path(trainer))
    notes = callback.notes
    if (weights or callback.settings.weights) == "best" and not notes:
        notes = _load_best(callback, trainer, duplicate, model, with_ranges=with_ranges)
    if with_ranges:
        Prepared.of(model).anneal_bits(0.0)
    callback.group.share_tensors(duplicate)
    duplicate = copied_to(duplicate, HOST)
    bound = model.bound_to(resolve(duplicate, callback.path)).on_host()
    with noting(callback.missing, "a look at hooks and layers is"):
        failure = callback.planned.failure(bound) if callback.planned is not None else ""
        callback.missing += [failure] if failure else stale(Prepared.of(model)) if with_ranges else []
    bound.varying = set().union(*callback.group.gather(model.varying))
    return Deployment(duplicate, bound, checkpoint, notes)


def _load_best(
    callback: QuantizationCallback,
    trainer: Trainer,
    duplicate: LightningModule,
    model: PlannedModel,
    *,
    with_ranges: bool,
) -> tuple[str, ...]:
    path = _existing(_best_path(trainer))
    if path is None:
        return ("weights are the last ones: no ModelCheckpoint has a best checkpoint",)
    try:
        # Written by this very run, so nothing in it is foreign; hyperparameters may be of any class.
        saved = torch.load(path, map_location="cpu", weights_only=False)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ImportError, AttributeError) as error:
        return (f"weights are the last ones: the best checkpoint {path.name} cannot be read: {error}",)
    if reason := _misfit(duplicate, saved):
        return (f"weights are the last ones: the best checkpoint {path.name} {reason}",)
    state = state_of(callback, callback.settings, saved.get("callbacks", {})) or {}
    early = ""
    if with_ranges:
        if state.get("phase") not in ("fake_quantize", "frozen", "frozen_batch_norm"):
            early = " was saved before fake quantization began"
        elif state.get("more_bits"):
            early = " was saved before the recipe's bits were reached"
        # A twin's metric is of the recipe's bits at any time; what validation itself logs is of those of the moment.
        is_scored = str(trainer.checkpoint_callback.monitor).startswith(f"{prefix_of(callback, trainer)}/twin")  # type: ignore[union-attr]
        if early and not (is_scored and state.get("more_bits")):
            return (f"weights are the last ones: the best checkpoint {path.name}{early}",)
        Prepared.of(model).load_state_dict(state)
    # What a module leaves out of its checkpoints, such as a backbone that stays as it is, has the last weights.
    duplicate.load_state_dict(saved["state_dict"], assign=True, strict=duplicate.strict_loading)
    return (f"weights are the best ones, from {path.name}{early and f', which{early}'}",)


def _misfit(module: LightningModule, saved: Any) -> str:
    """Return in words why a checkpoint's weights are not those of a module; empty where they are."""
    weights, own = saved.get("state_dict") if isinstance(saved, dict) else None, module.state_dict()
    if weights is None:
        return "has no weights"
    names = set(own) ^ set(weights) if module.strict_loading else set()
    names |= {name for name in set(own) & set(weights) if own[name].shape != weights[name].shape}
    return f"has other weights: {', '.join(sorted(names)[:3])}" if names else ""


def _best_path(trainer: Trainer) -> str:
    return getattr(trainer.checkpoint_callback, "best_model_path", "") or ""


def _last_path(trainer: Trainer) -> str:
    return getattr(trainer.checkpoint_callback, "last_model_path", "") or ""


def _existing(path: str) -> Path | None:
    return Path(path) if path and Path(path).is_file() else None
