"""Statistics of BatchNorm measured anew under rounding."""

import functools

import pytest
import torch
from models import CASES

from lightning_quant.calibrate.batch_norm import reestimate_batch_norm
from lightning_quant.calibrate.calibrate import calibrate
from lightning_quant.errors import CalibrationError
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.fake_quantize import fake_quantize


def test_statistics_are_the_means_over_all_batches_of_what_the_rounded_layer_gives() -> None:
    case = next(case for case in CASES if case.name == "mlp")
    model = case.build()
    calls = [case.call(16)[0][0] for _ in range(4)]
    prepared = prepare(model, (calls[0],), recipe="int8", observer="min_max")
    steps = [functools.partial(model, x) for x in calls]
    calibrate(prepared, steps)
    prepared.bias_corrections.clear()
    norm, linear = model.layers[1], model.layers[0]
    with torch.no_grad():
        norm.running_mean += 5
        rounded = [fake_quantize(x, *prepared.ranges.parameters(":x"), prepared.ranges.grid) for x in calls]
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        weight = torch.round(linear.weight / scale) * scale
        outputs = [x @ weight.T + linear.bias for x in rounded]
    flags = [module.training for module in model.modules()]
    assert reestimate_batch_norm(prepared, steps) == 2
    means, variances = [y.mean(0) for y in outputs], [y.var(0) for y in outputs]
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0), atol=1e-4, rtol=1e-4)
    assert norm.momentum == 0.1
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(CalibrationError, match="at least one batch"):
        reestimate_batch_norm(prepared, [])
