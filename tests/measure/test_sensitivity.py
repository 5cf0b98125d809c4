"""Sensitivity against a brute-force loop written from scratch."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import CASES
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.prepare import prepare
from lightning_quant.measure.edge_statistics import edge_statistics, ratio_to_median
from lightning_quant.measure.sensitivity import sensitivity
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.simulate.prepared import Prepared

# The nets here have layers that are planted to be bad.
pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")

PLAIN = Recipe(bias_correction=False, calibration_observer="min_max")


class FiveLayers(nn.Module):
    """Five linear layers, the third of them with one output channel that spoils its activation."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [6, 12, 12, 12, 12, 4]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


def five_layers() -> tuple[nn.Module, Prepared, list]:
    torch.manual_seed(0)
    model = FiveLayers().eval()
    with torch.no_grad():
        model.layers[2].bias[3] += 200
        model.layers[3].weight[:, 3] = 0
    calls = [((torch.randn(32, 6, generator=torch.Generator().manual_seed(seed)),), {}) for seed in range(2)]
    prepared = prepare(model, calls[0][0], recipe=PLAIN, observer="min_max")
    calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
    return model, prepared, calls


def brute_force(model: FiveLayers, x: Tensor, calls: list, weights: set[int], outputs: set[int]) -> Tensor:
    """Compute the net with these weights and these outputs (-1 is the input) rounded, from the definitions alone."""
    seen = torch.cat([args[0] for args, _ in calls])

    def rounded(value: Tensor, reference: Tensor) -> Tensor:
        low, high = reference.min().clamp(max=0), reference.max().clamp(min=0)
        scale = (high - low) / 255
        zero = torch.round(-low / scale)
        return (torch.round(value / scale).clamp(-zero, 255 - zero)) * scale

    x = rounded(x, seen) if -1 in outputs else x
    for index, layer in enumerate(model.layers):
        weight = layer.weight
        if index in weights:
            scale = weight.abs().amax(1, keepdim=True) / 127
            weight = torch.round(weight / scale) * scale
        x, seen = x @ weight.T + layer.bias, seen @ layer.weight.T + layer.bias
        if index < 4:
            x, seen = torch.relu(x), torch.relu(seen)
            x = rounded(x, seen) if index in outputs else x
    return x


@torch.no_grad()
def test_adds_up_with_a_brute_force_loop() -> None:
    model, prepared, calls = five_layers()
    found = sensitivity(prepared, calls)
    x = torch.cat([args[0] for args, _ in calls])
    exact = model(x)

    def error(weights: set[int], outputs: set[int]) -> float:
        return 10 ** (-signal_to_noise(exact, brute_force(model, x, calls, weights, outputs)) / 10)

    all_weights, all_outputs = set(range(5)), {-1, 0, 1, 2, 3}
    assert found.error == pytest.approx(error(all_weights, all_outputs), rel=0.02)
    assert len(found.layers) == 5
    for index in range(5):
        layer = next(layer for layer in found.layers if layer.name == f"layers.{index}")
        # What float operators hand to an operator, the input here, is quantized for its sake alone.
        own = ({index} | ({-1} if index == 0 else set())) & all_outputs
        assert layer.weight_error == pytest.approx(error({index}, set()), rel=1e-3)
        assert layer.activation_error == pytest.approx(error(set(), own) if own else 0.0, rel=1e-3)
        assert layer.only_error == pytest.approx(error({index}, own), rel=1e-3)
        assert layer.without_error == pytest.approx(error(all_weights - {index}, all_outputs - own), rel=0.02)
        alone = hidden(model, x, calls, index, {index}, own) if index < 4 else brute_force(model, x, calls, {4}, set())
        clean = hidden(model, x, calls, index, set(), set()) if index < 4 else exact
        assert layer.own_db == pytest.approx(signal_to_noise(clean, alone), abs=0.01)
        assert layer.low == pytest.approx(0.0 if index else float(clean.min()), abs=1e-6)
        assert layer.clipped == 0


def hidden(model: FiveLayers, x: Tensor, calls: list, index: int, weights: set[int], outputs: set[int]) -> Tensor:
    """Return what the layer after this one reads, by the same loop over the layers up to there."""
    part = FiveLayers()
    part.layers = nn.ModuleList([*model.layers[: index + 1], nn.Identity()])
    part.layers[-1].weight, part.layers[-1].bias = torch.eye(12), torch.zeros(12)
    part.layers.extend([part.layers[-1]] * (4 - index - 1))
    return brute_force(part, x, calls, weights, outputs)


def test_the_worst_layer_is_named_with_the_way_out() -> None:
    _, prepared, calls = five_layers()
    found = sensitivity(prepared, calls, score=lambda outputs: float(outputs[0][0, 0] * 0))
    assert found.layers[0].name == "layers.2"
    assert "layers.2, activations, range" in found.explanation()
    assert found.layers[0].spread > 50
    # Its tensor stays rounded as long as the next layer reads integers.
    assert '{"layers.2": "float", "layers.3": "float"}' in found.explanation()
    assert "+0.0 points" in found.explanation()
    assert found.layers[0].high > 150
    assert found.layers[0].without_error < 0.2 * found.error
    assert str(found).count("\n| layers.") == 5


class SharedInput(nn.Module):
    """Two layers read a LayerNorm with one loud feature; one more weight has a range that four bits cannot hold."""

    def __init__(self, loud: float, coarse: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.left, self.right = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.middle, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.norm.weight[3] *= loud
            self.left.weight[:, 3] /= loud
            self.right.weight[:, 3] /= loud
            self.middle.weight[:, 0] *= coarse
            self.left.weight[0] /= coarse
            self.left.bias[0] /= coarse
            self.right.weight[0] /= coarse
            self.right.bias[0] /= coarse

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = torch.relu(self.left(x)) + torch.relu(self.right(x))
        return self.last(torch.relu(self.middle(x)))


@pytest.mark.parametrize(
    ("net", "names"),
    [
        (FiveLayers, ("layers.2", "layers.3")),
        (lambda: SharedInput(200.0, 1.0), ("left", "right")),
        (lambda: SharedInput(1.0, 1000.0), ("middle",)),
    ],
)
def test_what_the_advice_promises_arrives(net: Callable[[], nn.Module], names: tuple[str, ...], tmp_path: Path) -> None:
    model, x = net().eval(), torch.randn(64, 6 if net is FiveLayers else 16, generator=torch.Generator().manual_seed(2))
    if net is FiveLayers:
        model = five_layers()[0]
    calls = [((part,), {}) for part in x.split(32)]
    errors, sizes, found = [], [], None
    for overrides in ({}, dict.fromkeys(names, "float")):
        recipe = replace(PLAIN, overrides=overrides)
        prepared = prepare(model, *calls[0], recipe=recipe, observer="min_max")
        calibrate(prepared, steps_of(prepared, list(x.split(32))))
        with torch.no_grad(), prepared.attached("frozen"):
            outputs = [model(*args) for args, _ in calls]
        errors.append(10 ** (-signal_to_noise([model(*args) for args, _ in calls], outputs) / 10))
        folder = tmp_path / str(len(overrides))
        artifact = lq.quantize(model, recipe, calibration_data=x.split(32), output_dir=folder, threads=1)
        sizes.append(artifact.model_path.stat().st_size)
        found = found or sensitivity(prepared, calls)
    assert found.advice is not None
    assert found.advice.names == names
    assert errors[1] < 0.2 * errors[0]
    assert 10 * math.log10(found.advice.error / errors[1]) == pytest.approx(0, abs=1)
    # Names and nodes of the graph are left out.
    assert abs(sizes[1] - sizes[0] - found.advice.float_bytes) < 1000 * len(names)


def test_channels_that_never_fire_are_no_yardstick() -> None:
    assert ratio_to_median(torch.tensor([0.0, 0.0, 0.0, 2.0, 6.0])) == 3.0
    assert ratio_to_median(torch.zeros(3)) == 1.0


@pytest.mark.parametrize("case", [case for case in CASES if case.exports], ids=lambda case: case.name)
def test_every_net_can_be_diagnosed_and_is_left_as_it_was(case) -> None:
    model = case.build()
    calls = [case.call(4) for _ in range(2)]
    prepared = prepare(model, *calls[0], recipe=PLAIN, observer="min_max")
    with torch.no_grad():
        calibrate(prepared, [lambda: model(*calls[0][0], **calls[0][1])])
        before = model(*calls[0][0], **calls[0][1])
    found = sensitivity(prepared, calls)
    assert len(found.layers) == len(prepared.operators)
    assert all(layer.only_error < 1 for layer in found.layers)
    assert all(0 <= layer.clipped <= 1 for layer in found.layers)
    with torch.no_grad():
        assert signal_to_noise(before, model(*calls[0][0], **calls[0][1])) == float("inf")


def test_statistics_of_each_channel() -> None:
    model, prepared, calls = five_layers()
    with torch.no_grad():
        found = edge_statistics(prepared, calls)
        hidden = torch.relu(model.layers[0](torch.cat([args[0] for args, _ in calls])))
    statistics = found[":relu"]
    torch.testing.assert_close(statistics.high, hidden.amax(0))
    torch.testing.assert_close(statistics.low, hidden.amin(0))
    torch.testing.assert_close(statistics.mean.float(), hidden.mean(0))
    assert statistics.number == hidden.numel()
    assert statistics.power == pytest.approx(float(hidden.square().sum()), rel=1e-5)
    assert statistics.outside == 0
