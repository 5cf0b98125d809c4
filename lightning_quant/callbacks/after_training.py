"""What is measured on training batches after training: BatchNorm's statistics, and which operator costs what."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_quant.calibrate.batch_norm import reestimate_batch_norm
from lightning_quant.callbacks.deployment import Deployment
from lightning_quant.callbacks.training_data import calibration_steps, working_copy
from lightning_quant.calls.calls import Call
from lightning_quant.calls.recorded_calls import recorded_calls
from lightning_quant.measure.sensitivity import NUM_CALLS, Sensitivity, rank_operators
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode, resolve


def reestimate(trainer: Trainer, deployment: Deployment, path: str, number: int) -> None:
    """Measure BatchNorm's statistics on a copy that may run the user's training step, and take them over.

    Args:
        trainer: whose data is meant.
        deployment: the weights to export.
        path: name of the module that was trained.
        number: of training batches.
    """
    duplicate = working_copy(trainer, deployment.pl_module)
    root = resolve(duplicate, path)
    prepared = Prepared.of(deployment.model).bound_to(root)
    steps = calibration_steps(trainer, duplicate, number, 0, "train")
    measured: dict[str, Tensor] = {}

    def noting() -> Iterator[Callable[[], Any]]:
        # The end of the steps puts the copy's buffers back.
        for step in steps:
            yield step
            measured.update({name: buffer.clone() for name, buffer in root.named_buffers()})

    reestimate_batch_norm(prepared, noting())
    for name, buffer in deployment.model.root.named_buffers():
        buffer.copy_(measured[name])


def rank(trainer: Trainer, deployment: Deployment, path: str) -> Sensitivity:
    """Measure every operator on training batches, which a copy may run the user's training step on."""
    return rank_operators(*training_calls(trainer, deployment, path, NUM_CALLS))


def training_calls(trainer: Trainer, deployment: Deployment, path: str, number: int) -> tuple[Prepared, list[Call]]:
    """Return calls that training batches make of the module, and the model over the copy that they are of."""
    duplicate = working_copy(trainer, deployment.pl_module)
    root = resolve(duplicate, path)
    with recorded_calls(root, number) as calls, evaluation_mode(root), torch.no_grad():
        for step in calibration_steps(trainer, duplicate, number, 0, "train"):
            step()
    return Prepared.of(deployment.model).bound_to(root), calls
