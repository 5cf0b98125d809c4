"""`runtime="auto"` at fit start: which runtime the artifact will run on, measured on the weights that are there."""

import functools
from typing import Any

from torch import nn

from lightning_quant.calibrate.calibrate import observe, settle
from lightning_quant.capture.capture import Capture
from lightning_quant.capture.loss_inputs import leave_out_labels
from lightning_quant.doors.settings import Settings
from lightning_quant.export.auto import Choice, choose_runtime
from lightning_quant.export.prepare import prepare
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.surgery.host import HOST, copied_to, moved_call


def choose_at_start(settings: Settings, module: nn.Module, captured: Capture, *, trains: bool) -> Choice:
    """Return the fastest correct runtime and what was measured, with ranges of the captured call alone.

    Training through rounding needs to know the runtime, which says what is rounded; and weights change neither how long
    a kernel takes nor whether it is right, which the report checks again at the end.

    Args:
        settings: recipe, selection, and what latencies are measured with.
        module: to quantize.
        captured: a call of it.
        trains: whether it will be trained through rounding.
    """
    duplicate = copied_to(module, HOST, unrouted=True)
    args, kwargs = moved_call(captured.args, captured.kwargs)
    recipe, selection = settings.recipe, settings.selection
    if not recipe.needs_calibration:
        args, kwargs, _ = leave_out_labels(duplicate, args, kwargs)

    def plan(runtime: str) -> PlannedModel:
        if not recipe.needs_calibration:
            return quantize_layers(duplicate, args, kwargs, recipe=recipe, runtime=runtime, selection=selection)
        where: dict[str, Any] = {"runtime": runtime, "selection": selection, "trains": trains}
        prepared = prepare(duplicate, args, kwargs, recipe=recipe, observer="min_max", **where)
        settle(prepared, observe(prepared, [functools.partial(duplicate, *args, **kwargs)], None), None)
        return prepared

    return choose_runtime(plan, settings.threads, settings.dynamic_shapes)
