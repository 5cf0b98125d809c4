"""What to keep in float, and what that gains."""

import torch
from torch import nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.prepare import prepare
from lightning_quant.measure.advice import Advice
from lightning_quant.measure.sensitivity import OperatorSensitivity, Sensitivity, sensitivity
from lightning_quant.recipe.recipe import Recipe

LAYER = OperatorSensitivity(
    *("stem.0", "conv2d", 0.02, 0.001, 0.021, 0.004, 17.0, 0.0, 6.0, 0.001), widest=40.0, spread=3.0, float_bytes=12_000
)


def test_no_layer_is_advised_that_moves_no_metric() -> None:
    found = Sensitivity((LAYER,), 0.02, Advice(("stem.0",), 0.01, 3000))
    assert found.with_gains({"acc": 0.00004, "loss": -0.00002}).advice is None
    nothing = found.with_gains({"acc": 0.0, "loss": -0.003})
    assert nothing.advice is None
    assert "keeping it float makes no metric better (acc +0.0000, loss -0.00300)" in nothing.explanation()
    # A gain is one in the metric's own direction, and losses count where there is nothing else.
    assert found.with_gains({"acc": -0.1}).advice is None
    assert found.with_gains({"acc": 0.1, "loss": 0.2}).advice is found.advice
    assert found.with_gains({"val_loss": -0.1}).advice is found.advice
    assert found.with_gains({"val_loss": 0.1}).advice is None
    assert found.with_gains({"perplexity": 0.1}, {"perplexity": False}).advice is None
    assert found.with_gains({"perplexity": 0.1}).advice is found.advice


PLAIN = Recipe(bias_correction=False, calibration_observer="min_max")


def test_nothing_is_advised_where_that_gains_nothing() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    prepared = prepare(model, (x,), recipe=PLAIN, observer="min_max")
    calibrate(prepared, steps_of(prepared, [x]))
    found = sensitivity(prepared, [((x,), {})])
    assert found.advice is None
    assert "overrides" not in found.explanation()
