from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_quant import load, runtimes
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export import convert as conversion
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.runtimes import openvino
from lightning_quant.simulate.parity import check_parity

IMAGE = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
# What stands between the integer convolution and a float linear layer of 32 inputs.
POOLS = {
    "windows": nn.AvgPool2d(3),
    "adaptive windows": nn.AdaptiveAvgPool2d(2),
    "after a max-pool": nn.Sequential(nn.MaxPool2d(3, 1), nn.AvgPool2d(2)),
    "before a dropout": nn.Sequential(nn.AvgPool2d(3), nn.Dropout()),
    "after an identity": nn.Sequential(nn.Identity(), nn.AvgPool2d(3)),
}


class Read(nn.Module):
    """A convolution that an integer one and a float linear layer read, the latter behind a pool."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.pool, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), pool, nn.Linear(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.first(x))
        return self.head(self.pool(y).flatten(1)), self.second(y)


def agreement(pool: nn.Module, folder: Path) -> tuple[float, float, dict[str, int]]:
    """Return decibels of float against simulated and of simulated against OpenVINO behind the pool, and what ran."""
    torch.manual_seed(0)
    model = Read(pool).eval()
    selection = Selection(exclude=("head",), include=("*",))
    prepared = prepare(model, (IMAGE,), runtime="openvino", observer="min_max", selection=selection)
    calibrate(prepared, steps_of(prepared, [IMAGE]))
    artifact = export(prepared, folder)
    with torch.no_grad():
        floating = model(IMAGE)[0]
        with prepared.attached("frozen"):
            simulated = model(IMAGE)[0]
    here = load(folder, threads=1)(IMAGE)[0]
    counts = openvino.RUNTIME.count_operators(artifact.model_path)
    return signal_to_noise(floating, simulated), signal_to_noise(simulated, here), counts


@pytest.mark.parametrize("name", POOLS)
def test_average_in_front_of_a_float_layer_is_not_rounded_by_openvino(name: str, tmp_path: Path) -> None:
    quantization, artifact, counts = agreement(POOLS[name], tmp_path)

    assert artifact > quantization + 40
    assert counts["Convolution_I8"] == 2


def test_without_the_clip_openvino_rounds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "shield_float_layers", lambda *_: None)
    quantization, artifact, _ = agreement(POOLS["windows"], tmp_path)

    assert artifact < quantization + 10


def test_pools_that_openvino_does_not_round_keep_their_integer_kernel(tmp_path: Path) -> None:
    *_, windows = agreement(POOLS["windows"], tmp_path / "windows")
    _, artifact, globally = agreement(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Upsample(2)), tmp_path / "global")

    assert artifact > 60
    assert windows.get("Pooling", 0) == 1
    assert globally.get("Reduce_I8", 0) == 1


@pytest.mark.parametrize("counted", [True, False])
def test_padded_averages_count_zeros_and_not_the_integer_zero(counted: bool, tmp_path: Path) -> None:
    # Without ReLU the integer that stands for zero is another one than 0.
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.AvgPool2d(2, 2, padding=1, count_include_pad=counted), nn.Conv2d(8, 4, 1)
    model = nn.Sequential(*layers).eval()
    prepared = prepare(model, (IMAGE,), runtime="openvino")
    calibrate(prepared, steps_of(prepared, [IMAGE]))
    export(prepared, tmp_path)
    with torch.no_grad(), prepared.attached("frozen"):
        simulated = model(IMAGE)

    assert signal_to_noise(simulated, load(tmp_path, threads=1)(IMAGE)) > 60
    assert next(row for row in prepared.plan.rows if row.name == "1").action == ("float" if counted else "int8")


def test_softmax_between_convolutions_stays_float_as_planned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Softmax(1), nn.Conv2d(8, 8, 3)).eval()
    x = torch.randn(4, 8, 12, 12)
    prepared = prepare(model, (x,))
    calibrate(prepared, steps_of(prepared, [x]))
    artifact = export(prepared, tmp_path)
    runtime = runtimes.get("onnxruntime")
    counts = runtime.count_operators(artifact.model_path)

    assert counts["Softmax"] == 1
    assert counts["QLinearConv"] == 2
    assert check_parity(prepared, load(artifact.path), runtime, artifact.model_path, [x]).failures == []
