"""Which call of the module is exported: training's, or that of validation or predict where it is another one."""

from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_quant.callbacks.evaluation_call import difference, evaluation_call
from lightning_quant.callbacks.prediction_call import finding_of_prediction, prediction_call, required_prediction
from lightning_quant.capture.capture import Capture
from lightning_quant.doors.settings import CallbackSettings
from lightning_quant.errors import CaptureError
from lightning_quant.surgery.routing import resolve


@dataclass(frozen=True)
class ExportedCall:
    """The call to export.

    Attributes:
        capture: the call.
        evaluated: the call that validation makes, where it was looked for and there is one.
        otherwise: whether it is another one than training's.
        findings: what the report should say of it.
    """

    capture: Capture
    evaluated: Capture | None = None
    otherwise: bool = False
    findings: tuple[str, ...] = ()


def exported_call(
    trainer: Trainer, pl_module: LightningModule, settings: CallbackSettings, captured: Capture, *, fills: bool
) -> ExportedCall:
    """Return the call to export: that of validation where it is another one than training's but for the tensors.

    Or that of predict, where that is asked for.

    Args:
        trainer: at fit start.
        pl_module: its module.
        settings: which call is wanted, and whether validation will run on the artifact.
        captured: the call that training makes.
        fills: whether the artifact may be layers alone, inside the user's own module.

    Raises:
        CaptureError: predict's is wanted, and there is none, or validation makes another one.
    """
    if settings.example == "example_input_array" or captured.parts:
        return ExportedCall(captured)
    module, findings = resolve(pl_module, captured.path), []
    evaluated = evaluation_call(trainer, pl_module, captured.path)
    of_predict = settings.example == "predict_batch"
    wanted = evaluated
    if of_predict:
        wanted = required_prediction(trainer, pl_module, captured.path)
        if settings.evaluate and not fills:
            _check_evaluates(module, wanted, evaluated)
    differs = "" if wanted is None else difference(module, captured, wanted)
    if wanted is not None and differs:
        findings.append(
            f"{'predict' if of_predict else 'validation'} calls {captured.path or 'the module'!r} otherwise: "
            f"{differs}. Its call is the one exported, and ranges of what training does not reach come from it"
        )
        captured = wanted
    prediction = None if of_predict else prediction_call(trainer, pl_module, captured.path)
    if prediction is not None:
        findings.append(finding_of_prediction(module, captured, prediction, fills=fills))
    return ExportedCall(captured, evaluated, bool(differs), tuple(filter(None, findings)))


def _check_evaluates(module: nn.Module, prediction: Capture, evaluated: Capture | None) -> None:
    """Refuse to evaluate an artifact of predict's call by a validation that makes another one."""
    differs = "" if evaluated is None else difference(module, prediction, evaluated, than="predict")
    if differs:
        raise CaptureError(
            f"Expected validation to call the module as predict does, to evaluate the artifact by, but {differs}. "
            "Pass `evaluate=False`."
        )
