"""A few batches kept in memory: what ranges of the weights as they are now are learned from, as often as wanted."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_quant.callbacks.training_data import _run_validation_step, batches, run_training_step
from lightning_quant.calls.calls import map_tensors
from lightning_quant.capture.capture import isolated_rng, unchanged
from lightning_quant.surgery.host import HOST
from lightning_quant.surgery.routing import device_of


@dataclass(frozen=True)
class KeptBatches:
    """Batches of one kind of data, on the host.

    Attributes:
        batches: as steps take them.
        seed: of whatever steps draw.
        data: "train" or "validation".
    """

    batches: tuple[Any, ...] = ()
    seed: int = 0
    data: str = "train"

    @classmethod
    def of(cls, trainer: Trainer, pl_module: LightningModule, number: int, seed: int, data: str) -> "KeptBatches":
        """Take the first batches that calibration would draw."""
        with isolated_rng(seed):
            taken = batches(trainer, pl_module, number, data)
            return cls(tuple(map_tensors(lambda t: t.to(HOST), batch) for batch in taken), seed, data)

    def steps(self, duplicate: LightningModule) -> Iterator[Callable[[], Any]]:
        """Yield steps that run a copy of a LightningModule on the batches, which stay as they are.

        Args:
            duplicate: from `independent_copy`.
        """
        device = device_of(duplicate)
        run = run_training_step if self.data == "train" else _run_validation_step
        with isolated_rng(self.seed), unchanged(duplicate):
            for index, kept in enumerate(self.batches):
                batch = map_tensors(lambda t: t.to(device, copy=True), kept)
                yield functools.partial(run, duplicate, batch, index)
