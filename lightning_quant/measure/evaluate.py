"""The user's own validation, on a copy of the LightningModule with another model in place of its module."""

import logging
import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_quant.calibrate.distributed import Group
from lightning_quant.calls.calls import Call
from lightning_quant.calls.recorded_calls import recorded_calls
from lightning_quant.capture.capture import isolated_rng
from lightning_quant.capture.namespaces import is_overridden
from lightning_quant.errors import EvaluationError
from lightning_quant.measure.evaluate_shares import Share, lent_strategy, merged, without_repetitions
from lightning_quant.surgery.host import HOST, copied_to
from lightning_quant.surgery.routing import Route, clone, resolve, route, unroute
from lightning_quant.terminal.progress import shown


class Metrics(dict[str, float]):
    """What a validation loop logged, by name.

    Attributes:
        higher_is_better: of the metrics of torchmetrics that say so.
        draws: whether a validation step drew random numbers.
    """

    def __init__(
        self,
        values: Mapping[str, float] | None = None,
        higher_is_better: dict[str, bool] | None = None,
        *,
        draws: bool = False,
    ) -> None:
        super().__init__(values or {})
        self.higher_is_better, self.draws = higher_is_better or {}, draws


class CountedCalls(Route):
    """Passes calls on and counts them."""

    def __init__(self, target: Callable[..., Any]) -> None:
        self.target, self.num_calls, self.num_samples = target, 0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Pass one call on."""
        self.num_calls += 1
        first = next((x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()), None)
        self.num_samples += 1 if first is None else len(first)
        return self.target(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> "CountedCalls":
        return self


def evaluate(
    trainer: Trainer,
    pl_module: LightningModule,
    path: str,
    target: Callable[..., Any] | None = None,
    *,
    quantized_layers: tuple[str, ...] = (),
    limit_batches: int | float | None = None,
    group: Group | None = None,
    on_cpu: bool = False,
    recorded: list[Call] | None = None,
    seed: int = 0,
) -> Metrics:
    """Run the validation loop of a LightningModule and return its metrics.

    Where several processes trained, each evaluates its share of the data and all return the metrics of the whole.

    Args:
        trainer: whose validation data, precision and limits are used; it is not disturbed.
        pl_module: left as it is; a copy is evaluated.
        path: qualified name of the quantized module.
        target: called in its place; None evaluates the module as it is, routed or not.
        quantized_layers: names, relative to the module, of layers that must not run beside the target.
        limit_batches: number or share of validation batches; the trainer's own limit by default.
        group: the processes that trained; all of them call this.
        on_cpu: whether the LightningModule has to run on the CPU, and not on the trainer's device.
        recorded: gets the arguments of the module's first call, where that is wanted.
        seed: of the random numbers that validation may draw.

    Raises:
        EvaluationError: validation never called the target, or ran a quantized layer in float beside it.
    """
    loaders = _validation_loaders(trainer)
    if loaders is None:
        return Metrics()
    device = HOST if on_cpu else trainer.strategy.root_device
    # Moved here, since Trainers move parameters in place, and those of a clone are the original's.
    duplicate = clone(pl_module) if device == HOST else copied_to(pl_module, device, in_float32=False)
    # Lightning's cache of metrics by id, which a copy must not inherit.
    duplicate._metric_attributes = None
    module = resolve(duplicate, path)
    counted = target if target is None or isinstance(target, CountedCalls) else CountedCalls(target)
    beside: set[str] = set()
    if counted is not None:
        unroute(module)
        route(module, counted)
        for name in quantized_layers:
            module.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: beside.add(name))
    _lend_transfer_hooks(trainer, duplicate)
    group = group or Group()
    shares = _Shares()
    loaders = without_repetitions(loaders, group)
    # The same random numbers for every candidate: what differs then is the candidate.
    recording: AbstractContextManager[list[Call]] = nullcontext([]) if recorded is None else recorded_calls(module, 1)
    with _quiet(), isolated_rng(seed), shown("Evaluating"), recording as calls:
        evaluator = _small_trainer(trainer, device, limit_batches, group, shares)
        results = evaluator.validate(duplicate, dataloaders=loaders, verbose=False)
    if recorded is not None:
        recorded += calls
    group.together(_check_calls, counted, beside, path)
    if group.size > 1:
        values = merged(group.gather(shares.values))
        return Metrics(values, shares.higher_is_better, draws=any(group.gather(shares.draws)))
    values = {name: float(value) for result in results for name, value in result.items()}
    return Metrics(values, shares.higher_is_better, draws=shares.draws)


def why_no_metrics(trainer: Trainer) -> str:
    """Say why a validation loop, run or not, gave no metrics."""
    if trainer.limit_val_batches == 0:
        return "the run has switched validation off"
    if not trainer.enable_validation:
        return "the run has no validation loop"
    return "the validation loop logs none"


class _Shares(Callback):
    """Keeps what the validation loop of one process logged, with the number of samples behind each mean."""

    def __init__(self) -> None:
        self.values: dict[str, Share] = {}
        self.higher_is_better: dict[str, bool] = {}
        self.draws = False
        self._before: Any = None

    def on_validation_batch_start(self, *_: Any) -> None:
        """Called when a validation step begins: see where the random numbers are."""
        self._before = _random_states()

    def on_validation_batch_end(self, *_: Any) -> None:
        """Called when a validation step ends: see whether it drew some."""
        self.draws = self.draws or self._before != _random_states()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation ends: read the results before they are reset."""
        results = trainer._results
        for item in () if results is None else results.values():
            if item.has_reset or not item.meta.on_epoch:
                continue
            suffix = item.meta.dataloader_idx if item.meta.add_dataloader_idx else None
            name = item.meta.forked_name(False) + (f"/dataloader_idx_{suffix}" if suffix is not None else "")
            higher_is_better = None if item.is_tensor else getattr(item.value, "higher_is_better", None)
            if higher_is_better is not None:
                self.higher_is_better[name] = bool(higher_is_better)
            value, number, how = item.compute(), 1.0, "same"
            if item.is_tensor:
                how = next(h for h in ("mean", "max", "min", "sum") if getattr(item.meta, f"is_{h}_reduction"))
                number = float(item.cumulated_batch_size) if how == "mean" else 1.0
            if isinstance(value, Tensor) and value.numel() == 1:
                self.values[name] = Share(float(value), number, how)


def _random_states() -> tuple[Any, ...]:
    """Return where the generators are that a step may draw from, comparable."""
    on_device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else torch.empty(0)
    tensors = tuple(state.numpy().tobytes() for state in (torch.get_rng_state(), on_device))
    return *tensors, pickle.dumps((random.getstate(), np.random.get_state()))


class _DataModuleLender(Callback):
    """Lets `validation_step` see the datamodule without another setup and teardown of it."""

    def __init__(self, datamodule: Any) -> None:
        self.datamodule = datamodule

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation begins: lend the datamodule."""
        trainer.datamodule = self.datamodule  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation ends: take it back before teardown."""
        trainer.datamodule = None  # type: ignore[attr-defined]


def _lend_transfer_hooks(trainer: Trainer, duplicate: LightningModule) -> None:
    """Let the copy transfer batches as the datamodule would."""
    datamodule = getattr(trainer, "datamodule", None)
    for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        if datamodule is not None and is_overridden(name, datamodule):
            duplicate.__dict__[name] = getattr(datamodule, name)


def _check_calls(counted: CountedCalls | None, beside: set[str], path: str) -> None:
    if counted is None:
        return
    name = repr(path) if path else "its own forward"
    if counted.num_calls == 0:
        raise EvaluationError(
            f"Expected `validation_step` to call {name}, but it never did: its metrics would be those of float."
        )
    if beside:
        raise EvaluationError(
            f"Expected `validation_step` to use {name} through its forward alone, but {sorted(beside)} ran in float "
            "beside it. Call the module itself, or pass `evaluate=False`."
        )


def _validation_loaders(trainer: Trainer) -> Any:
    if trainer.val_dataloaders is None and trainer.limit_val_batches and trainer.enable_validation:
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    return trainer.val_dataloaders


def _small_trainer(
    trainer: Trainer, device: torch.device, limit_batches: int | float | None, group: Group, shares: _Shares
) -> Trainer:
    where: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    if device != HOST:
        # The trainer's own, since Lightning has no name for accelerators of others.
        where = {"accelerator": trainer.accelerator, "devices": 1 if device.index is None else [device.index]}
        where["strategy"] = lent_strategy(trainer, device)
    elif group.size > 1:
        where["strategy"] = lent_strategy(trainer, device)
    evaluator = type(trainer)(
        **where,
        **_precision(trainer, device),
        limit_val_batches=trainer.limit_val_batches if limit_batches is None else limit_batches,
        logger=DummyLogger(),
        callbacks=[_DataModuleLender(getattr(trainer, "datamodule", None)), shares],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    _lend_progress(trainer, evaluator)
    return evaluator


def _precision(trainer: Trainer, device: torch.device) -> dict[str, Any]:
    """Return the precision of evaluation: the trainer's, but for weights that are not in float32.

    What is exported is float32: half weights would be another model, and converting would reach shared tensors.
    """
    if str(trainer.precision).endswith("-true"):
        return {"precision": "32-true"}
    plugin: Any = trainer.precision_plugin
    if type(plugin).__name__ == "MixedPrecision" and plugin.device == device.type:
        # Autocast knows its device, which a name of a precision does not tell for accelerators of others.
        return {"plugins": [type(plugin)(plugin.precision, plugin.device)]}
    return {"precision": trainer.precision}


def _lend_progress(trainer: Trainer, evaluator: Trainer) -> None:
    """Let `current_epoch` and `global_step` be those of the last validation while training."""
    begun: Any = trainer.fit_loop.epoch_progress.current
    current: Any = evaluator.fit_loop.epoch_progress.current
    current.ready = current.started = begun.started
    current.processed = current.completed = max(begun.started - 1, 0)
    loop = evaluator.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = trainer.global_step
    loop.manual_optimization.optim_step_progress.total.completed = trainer.global_step


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what a Trainer says of devices and workers; the user has read it at the start of fit."""
    loggers = [logging.getLogger(f"{name}.utilities.rank_zero") for name in ("lightning.pytorch", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def weighted_layers(root: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those names that are modules inside the root."""
    known = dict(root.named_modules())
    return tuple(name for name in names if name and name in known)
