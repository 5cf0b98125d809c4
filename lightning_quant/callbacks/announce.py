"""What a callback says when fit begins: how much of the module and of the step its plan takes."""

import warnings

from lightning.pytorch.utilities import rank_zero_info

from lightning_quant.callbacks.observe_step import Step
from lightning_quant.capture.capture import Capture
from lightning_quant.errors import NoEffectWarning
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.report.coverage import low_coverage

# What is left beside the module is no more than losses and metrics take.
_NEARLY_ALL = 0.995


def announce(callback: str, module: str, model: PlannedModel, step_share: float) -> None:
    """Say how much is quantized, and warn where that is little.

    Args:
        callback: name of its class.
        module: name of the module.
        model: with the plan.
        step_share: share of the multiply-adds of the LightningModule's step that the module makes, in [0, 1].
    """
    plan, of_step = model.plan, ""
    if step_share < _NEARLY_ALL:
        of_step = f", which is {plan.coverage * step_share:.1%} of the multiply-adds of the whole step"
    rank_zero_info(
        f"{callback}: {module} has {plan.num_quantized} operators for {plan.recipe} on {plan.runtime}, "
        f"{plan.shares()} of it{of_step}."
    )
    for warning in low_coverage(plan.to_dict()):
        warn(f"{callback}: {warning}.")


def announce_beside(callback: str, captured: Capture, step: Step) -> tuple[str, ...]:
    """Say what of the step's layers the module's own forward does not reach: return it for the report, if any.

    Args:
        callback: name of its class.
        captured: the call of the module that was recorded.
        step: what was seen of `training_step`.
    """
    if captured.beside:
        finding = (
            f"training_step calls {', '.join(map(repr, captured.beside))} beside {captured.path!r}, which makes "
            f"{step.share:.1%} of its multiply-adds: those modules are float"
        )
        rank_zero_info(f"{callback}: {finding}. Choose another one with `module=...`.")
        return (finding,)
    if not step.beside:
        return ()
    finding = (
        f"training_step also calls {', '.join(step.beside[:5])}{', ...' if len(step.beside) > 5 else ''} past the "
        f"forward of {captured.path!r}: those calls are float"
    )
    warn(f"{callback}: {finding}. Call {captured.path!r} itself to have them quantized.")
    return (finding,)


def warn(message: str) -> None:
    """Warn that something asked for had no effect or made matters worse."""
    warnings.warn(message, NoEffectWarning, stacklevel=3)
