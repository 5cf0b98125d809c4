"""A teacher for a run: what it adds is scaled as the run scales its own loss."""

import functools
from typing import Any

from lightning_quant.errors import QuantizationError
from lightning_quant.simulate.distillation import Distill, Teacher
from lightning_quant.simulate.prepared import Prepared


def teach(prepared: Prepared, distill: Distill, trainer: Any, asked: Any = True) -> None:
    """Have the module of a run taught, unless nobody can and only the recipe wants it.

    Raises:
        QuantizationError: the run scales its loss itself, so that nobody knows how; or a layer is none that is rounded.
    """
    if trainer.lightning_module.automatic_optimization:
        prepared.learn_from(Teacher(distill, functools.partial(_factor, trainer)))
    elif asked is not None:
        raise QuantizationError(
            "Expected automatic optimization with `distill`, but `training_step` calls `manual_backward` on losses of "
            "its own scale. Train without it."
        )


def _factor(trainer: Any) -> float:
    """Return by what a loss is multiplied: the scale of gradients in half precision, over the batches of a step."""
    return loss_scale(trainer) / trainer.accumulate_grad_batches


def loss_scale(trainer: Any) -> float:
    """Return by what a run multiplies its loss, so that gradients in half precision do not vanish: mostly 1."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
