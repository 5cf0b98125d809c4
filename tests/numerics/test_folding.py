"""BatchNorm is folded by arithmetic that commutes with rounding."""

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.errors import ExportError
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.fake_quantize import (
    channel_maximum,
    fake_quantize_weight,
    weight_scale,
)
from lightning_quant.numerics.folding import Statistics, fold


def conv_bn(gammas: list[float]) -> nn.Sequential:
    number = len(gammas)
    model = nn.Sequential(nn.Conv2d(3, number, 3, bias=False), nn.BatchNorm2d(number)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(gammas))
        model[1].bias.copy_(torch.linspace(-0.8, 0.9, number))
        model[1].running_mean.uniform_(-0.2, 0.2)
        model[1].running_var.uniform_(0.5, 2)
    return model


def qdq_and_steps(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of the converted and of the fake-quantized model, and the output's step."""
    prepared = prepare(model, (x,), observer="min_max")
    calibrate(prepared, steps_of(prepared, [x]))
    with torch.no_grad(), prepared.attached("frozen"):
        simulated = model(x)
    steps = torch.unique(simulated).diff()
    return convert(prepared)(x).detach(), simulated, steps[steps > 1e-6].min()


def test_gammas_of_any_size_and_sign_are_folded_right() -> None:
    model = conv_bn([0.0, -0.7, 1e-12, 1.0, -1e-12, 3.0])
    x = torch.randn(4, 3, 8, 8)
    converted, simulated, step = qdq_and_steps(model, x)
    # One step for the output's rounding and one for those of input and weight.
    torch.testing.assert_close(converted, model(x).detach(), atol=2 * step.item(), rtol=0)
    torch.testing.assert_close(converted, simulated, atol=1e-5, rtol=0)
    assert torch.all((converted[:, 0] - model[1].bias[0]).abs() <= step)


def test_dividing_by_gamma_would_not_be_finite() -> None:
    """The pair of the test above: rounding the folded weight and dividing the result by gamma again."""
    model = conv_bn([0.0, -0.7, 1.0])
    x = torch.randn(4, 3, 8, 8)
    gain = model[1].weight / torch.sqrt(model[1].running_var + model[1].eps)
    folded = model[0].weight * gain.view(-1, 1, 1, 1)
    rounded = fake_quantize_weight(folded, weight_scale(channel_maximum(folded), 127))
    careless = model[1](nn.functional.conv2d(x, rounded) / gain.view(1, -1, 1, 1))
    assert torch.isnan(careless[:, 0]).all()
    prepared = prepare(model, (x,), observer="min_max")
    calibrate(prepared, steps_of(prepared, [x]))
    model.train()
    with prepared.attached("fake_quantize", observing=True):
        result = model(x)
        result.square().sum().backward()
    assert torch.isfinite(result).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_folding_commutes_with_rounding() -> None:
    """Rounding the unfolded weight in training gives the integers that rounding the folded weight gives in convert."""
    model = conv_bn([0.3, -0.7, 1.9, 1e-2])
    x = torch.randn(4, 3, 8, 8)
    prepared = prepare(model, (x,), observer="min_max")
    calibrate(prepared, steps_of(prepared, [x]))
    layer = next(module for module in convert(prepared).modules() if type(module).__name__ == "QuantizedLayer")
    gain = model[1].weight / torch.sqrt(model[1].running_var + model[1].eps)
    folded = (model[0].weight * gain.view(-1, 1, 1, 1)).detach().flatten(1)
    expected = torch.round(folded / (folded.abs().amax(1, keepdim=True) / 127))
    torch.testing.assert_close(layer.weight.flatten(1).float(), expected, atol=1, rtol=0)
    assert (layer.weight.flatten(1) != expected).float().mean() < 0.01
    assert layer.weight.min() >= -127


def test_a_bias_beyond_int32_is_kept_by_stretching_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[0].weight[1] *= 1e-11
        model[0].bias.copy_(torch.tensor([1.0, -0.43, 0.2]))
    x = torch.randn(16, 4)
    torch.testing.assert_close(converted_model(model, x)(x), model(x), atol=0.02, rtol=0)
    for place in ("numerics.fake_quantize", "numerics.folding"):
        monkeypatch.setattr(f"lightning_quant.{place}.BIAS_LIMIT", 1e30)
    wrapped = converted_model(model, x)(x)
    assert torch.all((wrapped - model(x))[:, 0].abs() > 0.5)
    prepared = prepare(model, (x,), observer="min_max")
    calibrate(prepared, steps_of(prepared, [x]))
    with pytest.raises(ExportError, match="agree"):
        check_agreement(prepared, convert(prepared), (x,), {})


@pytest.mark.parametrize("gamma", [None, 1.0, -0.5, 1e-9])
def test_training_rounds_to_the_stretched_scale_too(gamma: float | None) -> None:
    weight, bias = torch.randn(4, 50) * torch.tensor([[1e-11], [1e-8], [1e-4], [1.0]]), torch.tensor([1.0, -3, 0.5, 2])
    norm = None
    if gamma is not None:
        norm = nn.BatchNorm1d(4).eval()
        nn.init.constant_(norm.weight, gamma)
        nn.init.constant_(norm.bias, 1.0)
    statistics = None
    if norm is not None:
        statistics = Statistics(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    folded = fold(weight, bias, statistics, torch.tensor(0.01), 127)
    gain = 1.0 if folded.gain is None else folded.gain.view(-1, 1)
    trained = fake_quantize_weight(weight, folded.unfolded_scale) * gain
    exported = folded.integers(weight, 127) * folded.scale.view(-1, 1)
    torch.testing.assert_close(trained, exported, rtol=1e-5, atol=0)
    assert folded.bias_integers.abs().max() < 2**31 - 2**29
    plain = weight_scale(channel_maximum(weight), 127)
    assert (folded.unfolded_scale > 2 * plain).tolist()[0]
    assert (folded.unfolded_scale > 2 * plain).tolist()[3] == (gamma == 1e-9)


def converted_model(model: nn.Module, x: Tensor) -> nn.Module:
    prepared = prepare(model, (x,), observer="min_max")
    calibrate(prepared, steps_of(prepared, [x]))
    return convert(prepared)
