"""Modules that are prepared and calibrated on one call, and what of their plans tests ask for."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.convert import convert
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.plan import Row
from lightning_quant.graph.qdq import QuantizedLayer
from lightning_quant.graph.table import Selection
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.simulate.prepared import Prepared


def ready(model: nn.Module, *args: Tensor, recipe: str | Recipe = "int8", runtime: str = "onnxruntime") -> Prepared:
    prepared = prepare(model, args, observer="min_max", recipe=recipe, runtime=runtime)
    calibrate(prepared, steps_of(prepared, [args]))
    return prepared


def evaluated(model: nn.Module, *args: Tensor, **options: Any) -> Prepared:
    """Return the same of a module that is in evaluation mode from now on."""
    return ready(model.eval(), *args, **options)


def rows_of(model: nn.Module, *args: Tensor, **selection: Any) -> dict[str, Row]:
    """Return the rows of a module's plan by name."""
    prepared = prepare(model.eval(), args, selection=Selection(**selection) if selection else None)
    return {row.name: row for row in prepared.plan.rows}


def noise(model: nn.Module, *args: Tensor) -> float:
    """Return the signal-to-noise of float against converted in decibels."""
    prepared = evaluated(model, *args)
    with torch.no_grad():
        return signal_to_noise(model(*args), convert(prepared)(*args))


def recorded_edges(prepared: Prepared, *args: Tensor) -> list[str]:
    with prepared.attached("frozen"), prepared.simulation.recording() as edges:
        prepared.root(*args)
    return [identity for identity, _ in edges]


def quantized_layers(converted: nn.Module) -> list[QuantizedLayer]:
    return [module for module in converted.modules() if isinstance(module, QuantizedLayer)]
