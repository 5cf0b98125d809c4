"""Sensitivity against a brute-force loop written from scratch."""

import itertools

import pytest
import torch
from models import CASES
from torch import Tensor, nn

from lightning_quant.accuracy.edge_statistics import edge_statistics
from lightning_quant.accuracy.sensitivity import sensitivity
from lightning_quant.calibrate import calibrate, steps_of
from lightning_quant.convert import signal_to_noise
from lightning_quant.prepare import prepare
from lightning_quant.prepared import Prepared
from lightning_quant.recipe import Recipe

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


def test_the_worst_layer_is_named_with_the_way_out() -> None:
    _, prepared, calls = five_layers()
    found = sensitivity(prepared, calls, score=lambda outputs: float(outputs[0][0, 0] * 0))
    assert found.layers[0].name == "layers.2"
    assert "layers.2, activations, range" in found.explanation()
    assert found.layers[0].spread > 50
    assert '{"layers.2": "float"}' in found.explanation()
    assert "+0.0 points" in found.explanation()
    assert found.layers[0].high > 150
    assert found.layers[0].without_error < 0.2 * found.error
    assert str(found).count("\n| layers.") == 5
    without = prepare(prepared.root, calls[0][0], recipe=Recipe(overrides={"layers.2": "float"}, bias_correction=False))
    assert "layers.2" not in {operator.key for operator in without.operators.values()}


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
