"""What is measured on training batches after training: BatchNorm's statistics, and which operator costs what."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_quant.calibrate.batch_norm import reestimate_batch_norm
from lightning_quant.calibrate.distributed import Group
from lightning_quant.callbacks.deployment import Deployment, write_buffers
from lightning_quant.callbacks.training_data import calibration_steps, working_copy
from lightning_quant.calls.calls import Call
from lightning_quant.calls.recorded_calls import recorded_calls
from lightning_quant.measure.sensitivity import NUM_CALLS, Sensitivity, rank_operators
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode, resolve


def reestimate(group: Group, trainer: Trainer, deployment: Deployment, path: str, number: int) -> Deployment:
    """Measure BatchNorm's statistics on a copy that may run the user's training step, and keep them where they help.

    Whether they do tells the loss on other training batches, or on the same where there are no others; where steps
    return none, they are kept. Processes measure on batches of their own, and have the mean.

    Args:
        group: the processes of the run.
        trainer: whose data is meant.
        deployment: the weights to export.
        path: name of the module that was trained.
        number: of training batches.

    Returns:
        the same with a note of what came of it.
    """
    duplicate, number = working_copy(trainer, deployment.pl_module), math.ceil(number / group.size)
    root = resolve(duplicate, path)
    prepared = Prepared.of(deployment.model).bound_to(root)
    kept = {name: buffer.clone() for name, buffer in root.named_buffers()}
    measured = group.together(_measured, trainer, duplicate, prepared, number)
    if not measured:
        return deployment
    measured = {name: group.mean(value.float()).to(value.dtype) for name, value in measured.items()}

    def losses() -> tuple[Tensor, str]:
        write_buffers(root, kept)
        before, used = _loss(trainer, duplicate, prepared, number)
        write_buffers(root, measured)
        return torch.tensor([before, _loss(trainer, duplicate, prepared, number)[0]]), used

    own, used = group.together(losses)
    before, after = group.mean(own).tolist()
    helps = not after > before
    if helps:
        write_buffers(deployment.model.root, measured)
    judged = f"loss on {used} {after:.4g}, with those of training {before:.4g}{'' if helps else ', which are kept'}"
    judged = "there is no loss to judge by" if math.isnan(after) else judged
    note = f"BatchNorm's statistics were measured anew on {number * group.size} training batches: {judged}"
    return replace(deployment, notes=(*deployment.notes, note), kept_buffers=kept if helps else None)


def _measured(trainer: Trainer, duplicate: LightningModule, prepared: Prepared, number: int) -> dict[str, Tensor]:
    """Return the buffers of a module with statistics of some training batches; none where it has no BatchNorm."""
    measured: dict[str, Tensor] = {}

    def noting() -> Iterator[Callable[[], Any]]:
        # The end of the steps puts the copy's buffers back.
        for step in calibration_steps(trainer, duplicate, number, 0, "train"):
            yield step
            measured.update({name: buffer.clone() for name, buffer in prepared.root.named_buffers()})

    return measured if reestimate_batch_norm(prepared, noting()) else {}


@torch.no_grad()
def _loss(trainer: Trainer, duplicate: LightningModule, prepared: Prepared, skipped: int) -> tuple[float, str]:
    """Return the mean loss of training batches behind some, of these where there are no others, and which those are.

    It is that of integers, and not a number where steps return none.
    """
    losses, first = list[float](), list[float]()
    with evaluation_mode(prepared.root), prepared.attached("frozen"):
        number = skipped + max(1, skipped // 2)
        for index, step in enumerate(calibration_steps(trainer, duplicate, number, 0, "train")):
            result = step()
            loss = result.get("loss") if isinstance(result, Mapping) else result
            value = float(loss) if isinstance(loss, Tensor) and loss.numel() == 1 else math.nan
            (losses if index >= skipped else first).append(value)
    chosen = losses or first
    return sum(chosen) / len(chosen) if chosen else math.nan, "others" if losses else "these"


def rank(trainer: Trainer, deployment: Deployment, path: str) -> Sensitivity:
    """Measure every operator on training batches, which a copy may run the user's training step on."""
    return rank_operators(*training_calls(trainer, deployment, path, NUM_CALLS))


def training_calls(trainer: Trainer, deployment: Deployment, path: str, number: int) -> tuple[Prepared, list[Call]]:
    """Return calls that training batches make of the module, and the model over the copy that they are of."""
    root, calls = calls_of_copy(trainer, deployment, path, number)
    return Prepared.of(deployment.model).bound_to(root), calls


def calls_of_copy(trainer: Trainer, deployment: Deployment, path: str, number: int) -> tuple[nn.Module, list[Call]]:
    """Return a copy of the module, and calls that training batches make of it."""
    duplicate = working_copy(trainer, deployment.pl_module)
    root = resolve(duplicate, path)
    with recorded_calls(root, number) as calls, evaluation_mode(root), torch.no_grad():
        for step in calibration_steps(trainer, duplicate, number, 0, "train"):
            step()
    return root, calls
