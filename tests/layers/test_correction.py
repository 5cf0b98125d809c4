"""Biases of stored layers make up for what the rounding of their weights does to the mean of the output."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_quant import load, quantize
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.recipe.recipe import LayerRecipe

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


class Depthwise(nn.Module):
    """Inputs far from zero, convolutions with and without bias, of groups, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.point = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.point(torch.relu(self.depth(x)) + 3.0)).mean((2, 3)))


def images(seed: int) -> Tensor:
    return torch.randn(8, 8, 9, 9, generator=torch.Generator().manual_seed(seed)) + 4.0


@pytest.mark.parametrize("schemes", [("weight_only",), ("weight_only_4bit", "weight_only"), ("dynamic", "weight_only")])
def test_means_of_outputs_stay(schemes: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, other = Depthwise().eval(), images(1)
    found = {}
    for corrects in (False, True):
        recipe = LayerRecipe("one", schemes, floor_db=5.0, group_size=8, bias_correction=corrects)
        quantized = quantize_layers(model, (images(0),), recipe=recipe, runtime="torch").quantized()
        found[corrects] = signal_to_noise(model(other), quantized(other))
    assert found[True] > found[False] + 3


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_files_hold_what_was_corrected(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = Depthwise().eval(), images(1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = quantize_layers(model, (images(0),), recipe="int8_weight_only", runtime=runtime).quantized()(other)
    quantize(model, "int8_weight_only", runtime, calibration_data=[images(0)], output_dir=tmp_path)

    assert signal_to_noise(expected, load(tmp_path)(other)) > 90
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    if runtime == "torch":
        assert signal_to_noise(expected, load(tmp_path, into=Depthwise())(other)) > 90
