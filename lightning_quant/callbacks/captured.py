"""What fit start sees of the module: the call that training makes, what is beside it, and what is exported."""

import contextlib
from dataclasses import dataclass, replace

from lightning.pytorch import LightningModule, Trainer

from lightning_quant.callbacks.evaluation_call import part_that_validation_calls
from lightning_quant.callbacks.exported_call import ExportedCall, exported_call
from lightning_quant.callbacks.observe_step import Step, observe_step
from lightning_quant.callbacks.training_data import capture_call
from lightning_quant.capture.capture import Capture
from lightning_quant.doors.settings import CallbackSettings
from lightning_quant.errors import CaptureError
from lightning_quant.graph.analyze import has_weights
from lightning_quant.layers import may_have_layers

_FINDING = "`training_step` calls {}, and `validation_step` goes past that: {!r}, which both reach, is quantized"


@dataclass(frozen=True)
class Captured:
    """What was seen.

    Attributes:
        captured: the call that training makes.
        step: what its step makes of the module; None where that was not looked for.
        exported: the call to export.
    """

    captured: Capture
    step: Step | None
    exported: ExportedCall


def look_at_module(
    trainer: Trainer, pl_module: LightningModule, settings: CallbackSettings, *, together: bool
) -> Captured:
    """Look at the module to quantize.

    Args:
        trainer: at fit start, with data attached.
        pl_module: its module; left as it is.
        settings: which module and which call are meant.
        together: whether several independent modules are parts of one, inside the user's own.
    """
    is_wanted = has_weights if settings.recipe.needs_calibration else may_have_layers(pl_module)
    path, findings = settings.module, tuple[str, ...]()
    captured = capture_call(trainer, pl_module, path, settings.example, is_wanted, together=together)
    exported = exported_call(trainer, pl_module, settings, captured, fills=together)
    if path is None and settings.example != "example_input_array" and not captured.parts and exported.evaluated is None:
        path = part_that_validation_calls(trainer, pl_module, captured.path, is_wanted)
    if path != settings.module:
        with contextlib.suppress(CaptureError):
            part = capture_call(trainer, pl_module, path, settings.example, is_wanted)
            findings = (_FINDING.format(repr(captured.path) if captured.path else "its own forward", part.path),)
            captured, exported = part, exported_call(trainer, pl_module, settings, part, fills=together)
    step = None
    if settings.example != "example_input_array" and captured.path:
        step = observe_step(trainer, pl_module, captured.path)
    return Captured(captured, step, replace(exported, findings=(*findings, *exported.findings)))
