"""The integer twin of weights in training: what would run if fit ended now, in the place of a copy's own module."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_quant.artifact import artifact as artifacts
from lightning_quant.calibrate.alignment import calibrate_aligned
from lightning_quant.calibrate.distributed import calibrate_together
from lightning_quant.callbacks.kept_batches import KeptBatches
from lightning_quant.callbacks.training_data import working_copy
from lightning_quant.export.export import export
from lightning_quant.machine.disk import scratch_folder
from lightning_quant.measure.beside import Beside
from lightning_quant.planned.parts import in_parts
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.host import HOST
from lightning_quant.surgery.routing import resolve, route, unroute_all

if TYPE_CHECKING:
    from lightning_quant.callbacks.base import QuantizationCallback


def place_twin(
    callback: "QuantizationCallback",
    trainer: Trainer,
    pl_module: LightningModule,
    beside: Beside,
    sample: KeptBatches,
    stack: ExitStack,
) -> None:
    """Let a copy of a LightningModule call the integer twin of its module, until a stack is closed.

    Args:
        callback: whose module, plan and ranges are meant.
        trainer: in validation.
        pl_module: that is trained.
        beside: whose copy gets the twin.
        sample: batches to learn ranges from, where training has not learned them.
        stack: takes the twin away, and its files.
    """
    root = resolve(beside.pl_module, callback.path)
    model = callback.require_prepared()
    twin: PlannedModel
    if not isinstance(model, Prepared):
        twin = model.bound_to(root)
    else:
        learns = model.phase != "off"
        twin = model.apart(root) if learns else _calibrated(callback, trainer, pl_module, sample).bound_to(root)
        twin.know_graphs(model)
        # What is traced for one score is there for the next.
        stack.callback(model.know_graphs, twin)
        if learns:
            twin.observe_unreached()
        stack.enter_context(twin.simulation.keeping_weights())
    if callback.settings.score_with == "runtime":
        _place_file(callback, twin, beside, stack.enter_context(scratch_folder()) / "twin")
    else:
        stack.enter_context(twin.attached())


def runs_on(callback: "QuantizationCallback", trainer: Trainer) -> torch.device:
    """Return where a twin runs: where training does, but for files that are layers, whose kernels are the CPU's."""
    is_inside = callback.settings.score_with == "runtime" and callback.require_prepared().runs_inside
    return HOST if is_inside else trainer.strategy.root_device


def _calibrated(
    callback: "QuantizationCallback", trainer: Trainer, pl_module: LightningModule, sample: KeptBatches
) -> Prepared:
    """Return ranges of the present weights, from the user's own step on a few batches, without accuracy steps."""
    model = Prepared.of(callback.require_prepared())
    # As after training: steps may take gradients.
    with torch.inference_mode(False), torch.enable_grad():
        duplicate = working_copy(trainer, pl_module)
        unroute_all(duplicate)
        prepared = model.anew(resolve(duplicate, callback.path))
        prepared.know_graphs(model)
        if callback.group.size > 1:
            calibrate_together(callback.group, prepared, lambda: sample.steps(duplicate))
        else:
            calibrate_aligned(prepared, lambda: sample.steps(duplicate))
    model.know_graphs(prepared)
    return prepared


def _place_file(callback: "QuantizationCallback", twin: PlannedModel, beside: Beside, folder: Path) -> None:
    settings = callback.settings
    model = twin.on_host()
    artifact = export(model, folder, dynamic_shapes=settings.dynamic_shapes, engine=settings.engine)
    root = resolve(beside.pl_module, callback.path)
    if model.runs_inside:
        artifacts.open_model(artifact, into=root)
        return
    target: Callable[..., Any] = in_parts(artifacts.open_model(artifact), model)
    route(root, target if callback.loss_inputs is None else callback.loss_inputs.outside(target))
