"""The user's own validation, on a copy of the LightningModule with another model in place of its module."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_quant.calibrate.distributed import Group
from lightning_quant.calls.calls import Call
from lightning_quant.calls.recorded_calls import recorded_calls
from lightning_quant.capture.capture import isolated_rng
from lightning_quant.capture.namespaces import is_overridden
from lightning_quant.errors import EvaluationError
from lightning_quant.measure.contributions import Metrics
from lightning_quant.measure.evaluate_shares import merged, without_repetitions
from lightning_quant.measure.interim import Interim
from lightning_quant.measure.logged_values import LoggedValues
from lightning_quant.measure.recorder import Recorder
from lightning_quant.measure.validation_trainer import quiet, validation_trainer
from lightning_quant.surgery.host import HOST, copied_to
from lightning_quant.surgery.routing import Route, clone, resolve, route, unroute
from lightning_quant.terminal.progress import shown

# What is to look at the module that validation calls.
Watch = Callable[[nn.Module], AbstractContextManager[Any]]


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
    contributions: bool = False,
    watch: Watch = nullcontext,
    interim: Interim | None = None,
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
        contributions: whether to note what each batch adds to metrics that keep all they saw, too; to the others it
            is noted in any case, in one process.
        watch: is entered with the module of the copy while validation runs.
        interim: says in which order batches come, and ends validation where it decides, in one process; the metrics
            are those of a part of the data then.

    Raises:
        EvaluationError: validation never called the target, or ran a quantized layer in float beside it.
    """
    loaders = _validation_loaders(trainer)
    if loaders is None:
        return Metrics()
    device = HOST if on_cpu else trainer.strategy.root_device
    duplicate = _copy_to_evaluate(trainer, pl_module, device)
    module = resolve(duplicate, path)
    counted = target if target is None or isinstance(target, CountedCalls) else CountedCalls(target)
    beside = set[str]() if counted is None else _routed(module, counted, quantized_layers)
    group = group or Group()
    shares = LoggedValues(Recorder(lists=contributions) if group.size == 1 else None, interim)
    loaders = without_repetitions(loaders, group)
    loaders = loaders if interim is None else interim.loader(loaders)
    results: Sequence[Mapping[str, float]] = []
    # The same random numbers for every candidate: what differs then is the candidate.
    recording: AbstractContextManager[list[Call]] = nullcontext([]) if recorded is None else recorded_calls(module, 1)
    ending = nullcontext() if interim is None else interim.ending()
    with quiet(), isolated_rng(seed), shown("Evaluating"), watch(module), recording as calls, ending:
        evaluator = validation_trainer(trainer, device, limit_batches, group, shares)
        results = evaluator.validate(duplicate, dataloaders=loaders, verbose=False)
    if recorded is not None:
        recorded += calls
    group.together(_check_calls, counted, beside, path)
    metrics = _metrics(results, shares, group)
    return metrics if interim is None else interim.outcome(metrics)


def _routed(module: nn.Module, counted: CountedCalls, quantized_layers: tuple[str, ...]) -> set[str]:
    """Let a module's calls be counted and passed on; return what gets the names of layers that run beside that."""
    unroute(module)
    route(module, counted)
    beside: set[str] = set()
    for name in quantized_layers:
        module.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: beside.add(name))
    return beside


def _metrics(results: Sequence[Mapping[str, float]], shares: LoggedValues, group: Group) -> Metrics:
    if group.size > 1:
        values = merged(group.gather(shares.values))
        return Metrics(values, shares.higher_is_better, draws=any(group.gather(shares.draws)))
    values = {name: float(value) for result in results for name, value in result.items()}
    return Metrics(values, shares.higher_is_better, draws=shares.draws, contributions=shares.contributions(values))


def _copy_to_evaluate(trainer: Trainer, pl_module: LightningModule, device: torch.device) -> LightningModule:
    # Moved here, since Trainers move parameters in place, and those of a clone are the original's.
    duplicate = clone(pl_module) if device == HOST else copied_to(pl_module, device, in_float32=False)
    # Lightning's cache of metrics by id, which a copy must not inherit.
    duplicate._metric_attributes = None
    _lend_transfer_hooks(trainer, duplicate)
    return duplicate


def why_no_metrics(trainer: Trainer) -> str:
    """Say why a validation loop, run or not, gave no metrics."""
    if trainer.limit_val_batches == 0:
        return "the run has switched validation off"
    if not trainer.enable_validation:
        return "the run has no validation loop"
    return "the validation loop logs none"


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


def weighted_layers(root: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those names that are modules inside the root."""
    known = dict(root.named_modules())
    return tuple(name for name in names if name and name in known)
