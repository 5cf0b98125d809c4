"""Re-estimate the statistics of BatchNorm under rounding, after quantization-aware training.

Running averages lag behind weights that jump between two roundings. Source: Nagel et al. 2022, arXiv:2203.11086,
section 3.1: the statistics that inference uses are measured anew, with the final weights, on a few batches.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lightning_quant.errors import CalibrationError
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode


@torch.no_grad()
def reestimate_batch_norm(prepared: Prepared, steps: Iterable[Callable[[], Any]]) -> int:
    """Replace running statistics by the mean over steps that run the fake-quantized module; return how many layers.

    Args:
        prepared: detached, every edge observed; its module's buffers are written.
        steps: each calls the module at least once.

    Raises:
        CalibrationError: there was no step.
    """
    root = prepared.root
    norms = [m for m in root.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    number = 0
    with evaluation_mode(root), prepared.attached("frozen"):
        try:
            for norm in norms:
                norm.reset_running_stats()
                # None is a plain average over all batches.
                norm.momentum, norm.training = None, True
            # Not evaluation as a whole, which would compute what integer kernels do, with the old statistics.
            root.training = True
            for step in steps:
                step()
                number += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if number == 0:
        raise CalibrationError("Expected at least one batch to re-estimate BatchNorm with, but got none.")
    return len(norms)
