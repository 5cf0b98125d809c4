"""Calibrate again on recorded calls, as is due after layers or channel scales have changed."""

from collections.abc import Callable, Sequence

import torch

from lightning_quant.calibrate.calibrate import observe, settle
from lightning_quant.calls.calls import Call
from lightning_quant.numerics.bias_correction import InputMeans
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import device_of


@torch.no_grad()
def recalibrate(prepared: Prepared, calls: list[Call], beside: Sequence[Prepared] = ()) -> None:
    """Forget all ranges and bias corrections, and learn them from calls; what none of these reaches keeps its range.

    Args:
        prepared: detached; its observers are made anew.
        calls: of the module.
        beside: other bindings of the same plan to the same module, which see the same run: with other channel scales
            and layers nothing else of it differs.
    """
    every = (prepared, *beside)
    earlier = [one.ranges.observers for one in every]
    means = [InputMeans() if one.recipe.bias_correction else None for one in every]
    for one in every:
        one.ranges = one.ranges.anew(one.recipe, one.observer)
        one.ranges.to(device_of(one.root))

    def step(call: Call) -> Callable[[], None]:
        def run() -> None:
            prepared.root(*call[0], **call[1])
            for one in beside:
                one.ranges.settle()

        return run

    with prepared.simulation.observing_beside(list(zip(beside, means[1:], strict=True))):
        number = observe(prepared, [step(call) for call in calls], means[0])
    for one, known, own in zip(every, earlier, means, strict=True):
        for identity, observer in one.ranges.observers.items():
            if observer.low is None and known[identity].low is not None:
                observer.load_state(known[identity].state())
        settle(one, number, own)
