"""OpenVINO adds inside its convolutions, before it rounds: what is simulated, and what is exported, says so."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant import runtimes
from lightning_quant.artifact import artifact as artifacts
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.simulate.parity import check_parity


def coarse(x: Tensor) -> Tensor:
    """Return what stays float between integer operators."""
    return F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0)


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lateral of a feature pyramid": lambda y, x: y + coarse(x),
    "behind ReLU": lambda y, x: F.relu(y) + coarse(x),
    "difference": lambda y, x: y - coarse(x),
    "behind a factor": lambda y, x: 2 * y + coarse(x),
    "two behind ReLU": lambda y, x: F.relu(y) + F.relu(x),
    "behind an average": lambda y, x: y + F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0),
}


class Joined(nn.Module):
    """Two convolutions that meet, and one that reads what comes of it."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.join = join
        self.stem, self.first, self.second, self.last = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.last(self.join(self.first(x), self.second(x)))


@pytest.mark.parametrize("name", JOINS)
def test_sum_in_float_is_what_was_simulated(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Joined(JOINS[name]).eval(), torch.randn(4, 8, 16, 16)
    prepared = prepare(model, (x,), runtime="openvino")
    calibrate(prepared, steps_of(prepared, [x]))
    artifact = export(prepared, tmp_path)
    loaded = artifacts.load(artifact.path, threads=1)
    parity = check_parity(prepared, loaded, runtimes.get("openvino"), artifact.model_path, [x])

    assert parity.failures == []
    assert parity.artifact_db > parity.quantization_db + 10
    assert artifact.manifest["plan"]["coverage"] == 1.0
    assert runtimes.get("openvino").count_operators(artifact.model_path)["Convolution_I8"] == 4
