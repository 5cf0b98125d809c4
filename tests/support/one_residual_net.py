"""A residual net, prepared and calibrated for a runtime."""

import lightning_models  # noqa: F401  makes exporting quick
import torch
from models import ResidualNet, with_statistics

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.prepare import prepare
from lightning_quant.simulate.prepared import Prepared

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def ready(runtime: str) -> Prepared:
    torch.manual_seed(0)
    model = with_statistics(ResidualNet()).eval()
    prepared = prepare(model, (IMAGE,), runtime=runtime, observer="min_max")
    calibrate(prepared, steps_of(prepared, [IMAGE]))
    return prepared
