"""Calibrate again on recorded calls, as is due after layers or channel scales have changed."""

import functools

import torch

from lightning_quant.calibrate.calibrate import observe, settle
from lightning_quant.calls.calls import Call
from lightning_quant.numerics.bias_correction import InputMeans
from lightning_quant.simulate.prepared import Prepared


@torch.no_grad()
def recalibrate(prepared: Prepared, calls: list[Call]) -> None:
    """Forget all ranges and bias corrections, and learn them from calls; what none of these reaches keeps its range."""
    earlier = prepared.ranges.observers
    prepared.ranges = prepared.ranges.anew(prepared.recipe, prepared.observer)
    means = InputMeans() if prepared.recipe.bias_correction else None
    steps = [functools.partial(prepared.root, *args, **kwargs) for args, kwargs in calls]
    number = observe(prepared, steps, means)
    for identity, observer in prepared.ranges.observers.items():
        if observer.low is None and earlier[identity].low is not None:
            observer.load_state(earlier[identity].state())
    settle(prepared, number, means)
