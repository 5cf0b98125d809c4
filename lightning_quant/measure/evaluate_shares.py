"""Evaluation by several processes: each sees a share of the validation data, and the metrics are those of the whole."""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_quant.calibrate.distributed import Group


@dataclass(frozen=True)
class Share:
    """One logged value of one process.

    Attributes:
        value: over the data of that process, or of all where `how` is "same".
        number: of samples behind a mean.
        how: "mean", "max", "min", "sum", or "same" for a `torchmetrics.Metric`, whose states the processes exchange.
    """

    value: float
    number: float
    how: str


def merged(parts: list[dict[str, Share]]) -> dict[str, float]:
    """Return the metrics of all data from what every process logged of its own; not all need to log the same."""
    result: dict[str, float] = {}
    reductions: dict[str, Callable[[list[float]], float]] = {"max": max, "min": min, "sum": sum}
    for name in dict.fromkeys(name for part in parts for name in part):
        shares = [part[name] for part in parts if name in part]
        values = [share.value for share in shares]
        number = sum(share.number for share in shares)
        if len(shares) == 1 or shares[0].how == "same":
            result[name] = values[0]
        elif shares[0].how == "mean":
            result[name] = sum(share.value * share.number for share in shares if share.number) / (number or 1)
        else:
            result[name] = reductions[shares[0].how](values)
    return result


def without_repetitions(loaders: Any, group: Group) -> Any:
    """Return loaders that leave out the samples which a DistributedSampler repeats to give all processes as many.

    Where that would leave processes with different numbers of batches it is not done: a validation step that talks to
    the other processes would wait forever.
    """
    if group.size == 1:
        return loaders
    return pytree.tree_map(lambda loader: _without_repetitions(loader, group), loaders)


def _without_repetitions(loader: Any, group: Group) -> Any:
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, DistributedSampler):
        return loader
    old, batches = loader.sampler, loader.batch_sampler
    if type(batches) is not BatchSampler or batches.drop_last or old.shuffle or len(old.dataset) < group.size:  # type: ignore[arg-type]
        return loader
    sampler = UnrepeatedDistributedSampler(old.dataset, num_replicas=old.num_replicas, rank=old.rank, shuffle=False)
    if len(set(group.gather(-(-len(sampler) // batches.batch_size)))) > 1:
        return loader
    probe = copy.copy(loader)
    probe.__dict__.update(sampler=sampler, batch_sampler=BatchSampler(sampler, batches.batch_size, drop_last=False))
    return probe


def lent_strategy(trainer: Trainer, device: torch.device) -> Any:
    """Return a strategy of one device that knows its place among the processes of a trainer.

    What the user logs stays with its process, where `merged` finds it, whether `sync_dist` was asked for or not.
    """
    namespace = type(trainer).__module__.partition(".trainer")[0]
    base: Any = importlib.import_module(f"{namespace}.strategies").SingleDeviceStrategy
    lender: Any = trainer.strategy
    members = {
        "is_global_zero": property(lambda self: lender.is_global_zero),
        "all_gather": lambda self, tensor, group=None, sync_grads=False: lender.all_gather(tensor, group, sync_grads),
        "broadcast": lambda self, value, src=0: lender.broadcast(value, src),
        "barrier": lambda self, *args, **kwargs: lender.barrier(),
    }
    strategy = type("LentStrategy", (base,), members)(device=device)
    for name in ("global_rank", "local_rank", "node_rank", "world_size"):
        # A strategy of one process has not all of them.
        if hasattr(lender, name):
            setattr(strategy, name, getattr(lender, name))
    return strategy
