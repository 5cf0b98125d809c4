"""What graphs call in evaluation computes what integer kernels compute."""

from typing import Any

import pytest
import torch
from models import CASES, Case, calibrated
from residual_nets import IMAGE, UNCORRECTED, residual_net
from torch import nn

from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.simulate.prepared import Prepared


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_evaluation_with_and_without_gradients_agrees(case: Case) -> None:
    """Exact integer arithmetic, used where no gradient is asked for, and float arithmetic differ by few ties only."""
    model, prepared = calibrated(case, recipe=UNCORRECTED)
    args, kwargs = case.call(4)
    check_that_gradients_change_nothing(model, prepared, args, kwargs)


def test_evaluation_with_gradients_knows_corrected_biases() -> None:
    case = next(case for case in CASES if case.name == "mlp")
    model, prepared = calibrated(case)
    args, kwargs = case.call(4)
    check_that_gradients_change_nothing(model, prepared, args, kwargs)


def check_that_gradients_change_nothing(model: nn.Module, prepared: Prepared, args: Any, kwargs: Any) -> None:
    with prepared.attached("frozen"):
        with torch.no_grad():
            exact = model(*args, **kwargs)
        rounded = model(*args, **kwargs)
    with torch.no_grad():
        float_output = model(*args, **kwargs)
    leaves = [tensor_leaves(output) for output in (float_output, exact, rounded)]
    assert signal_to_noise(leaves[1], leaves[2]) > signal_to_noise(leaves[0], leaves[1]) + 6


def test_recorded_integers_are_the_grid_of_each_edge() -> None:
    model, prepared = residual_net()
    with torch.no_grad(), prepared.attached("frozen"), prepared.simulation.recording() as edges:
        model(IMAGE)
    assert [identity for identity, _ in edges] == list(dict(edges))
    assert set(dict(edges)) == set(prepared.ranges.edges)
    image = dict(edges)[":image"]
    scale, zero_point = prepared.ranges.parameters(":image")
    expected = torch.clamp(torch.round(IMAGE / scale) + zero_point, 0, 255)
    assert image.dtype == torch.uint8
    assert torch.equal(image.float(), expected)
    assert prepared.simulation.recorded is None
