import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.convert.convert import check_agreement, convert
from lightning_quant.errors import ExportError
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.fake_quantize import (
    affine_parameters,
    channel_maximum,
    fake_quantize,
    fake_quantize_weight,
    weight_scale,
)
from lightning_quant.numerics.folding import Statistics, fold
from lightning_quant.numerics.grid import UINT8, Grid

FINITE = st.floats(-1e6, 1e6, width=32)


def numpy_quantize(x: np.ndarray, scale: np.float32, zero_point: int, quant_max: int) -> np.ndarray:
    return np.clip(np.rint(x / scale) + zero_point, 0, quant_max)


def numpy_dequantize(integers: np.ndarray, scale: np.float32, zero_point: int) -> np.ndarray:
    return (integers - zero_point).astype(np.float32) * scale


def numpy_fake_quantize(x: np.ndarray, low: float, high: float, quant_max: int = 255) -> np.ndarray:
    low, high = np.float32(min(low, 0)), np.float32(max(high, 0))
    scale = (high - low) / np.float32(quant_max)
    zero_point = int(np.rint(-low / scale))
    return numpy_dequantize(numpy_quantize(x, scale, zero_point, quant_max), scale, zero_point)


def grid(low: float, high: float, quant_max: int = 255) -> tuple[Tensor, Tensor]:
    return affine_parameters(torch.tensor(low), torch.tensor(high), Grid(0, quant_max, torch.uint8))


# --- activations


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 2.0), (0.0, 6.0), (-3.7, 0.0), (0.5, 2.0), (-4.0, -1.0), (-1e-4, 3e4)]
)
@pytest.mark.parametrize("quant_max", [255, 15])
def test_rounding_equals_numpy(low: float, high: float, quant_max: int) -> None:
    scale, zero_point = grid(low, high, quant_max)
    # Ties, values on and beyond both ends, and values between.
    steps = np.arange(-quant_max - 20, quant_max + 20, 0.25, dtype=np.float32) * scale.numpy()
    x = np.concatenate([steps, np.random.default_rng(0).uniform(2 * low, 2 * high, 500).astype(np.float32)])
    actual = fake_quantize(torch.from_numpy(x), scale, zero_point, Grid(0, quant_max, torch.uint8)).numpy()
    np.testing.assert_array_equal(actual, numpy_fake_quantize(x, low, high, quant_max))
    assert len(np.unique(actual)) <= quant_max + 1


def test_rounding_equals_the_onnx_specification() -> None:
    scale, zero_point = grid(-1.3, 2.9)
    x = torch.cat([torch.randn(1000), (torch.arange(-300, 300) + 0.5) * scale]).float()
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
    nodes += [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    constants = [
        onnx.numpy_helper.from_array(scale.numpy(), "s"),
        onnx.numpy_helper.from_array(np.uint8(zero_point.item()), "z"),
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy"]
    graph = helper.make_graph(nodes, "pair", infos[:1], infos[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    np.testing.assert_array_equal(fake_quantize(x, scale, zero_point, UINT8).numpy(), expected)


@settings(deadline=None, max_examples=200)
@given(FINITE, FINITE)
def test_zero_is_exact_and_the_range_is_covered(first: float, second: float) -> None:
    low, high = min(first, second), max(first, second)
    scale, zero_point = grid(low, high)
    assert fake_quantize(torch.zeros(1), scale, zero_point, UINT8).item() == 0.0
    assert zero_point.item() in range(256)
    ends = torch.tensor([min(low, 0.0), max(high, 0.0)])
    rounded = fake_quantize(ends, scale, zero_point, UINT8)
    assert torch.all((rounded - ends).abs() <= scale * (0.5 + 1e-4))


def test_grid_of_what_was_always_zero_is_one_that_kernels_can_divide_by() -> None:
    scale, zero_point = grid(0.0, 0.0)

    assert (scale * 255).item() == pytest.approx(1.0)
    assert zero_point.item() == 0


def test_without_widening_zero_is_lost() -> None:
    """The pair of the test above: a grid over [1, 2] alone has no integer for zero."""
    low, high = np.float32(1), np.float32(2)
    scale = (high - low) / np.float32(255)
    zero_point = np.clip(np.rint(-low / scale), 0, 255)
    assert numpy_dequantize(numpy_quantize(np.float32(1.5), scale, zero_point, 255), scale, zero_point) == 1.0
    scale, zero_point = grid(1.0, 2.0)
    assert fake_quantize(torch.tensor([1.5]), scale, zero_point, UINT8).item() == pytest.approx(
        1.5, abs=scale.item() / 2
    )


@pytest.mark.parametrize("value", [0.0, -2.5, 1e-30, 3e8])
def test_a_range_of_one_value_is_usable(value: float) -> None:
    scale, zero_point = grid(value, value)
    assert scale > 0
    assert torch.isfinite(scale)
    result = fake_quantize(torch.tensor([value]), scale, zero_point, UINT8)
    assert result.item() == pytest.approx(value, rel=1e-2, abs=1e-9)


def test_gradient_is_one_inside_the_range_and_zero_outside() -> None:
    scale, zero_point = grid(-1.0, 2.0)
    x = torch.linspace(-2, 4, 10_001).requires_grad_()
    fake_quantize(x, scale, zero_point, UINT8).sum().backward()
    reference = x.detach().clone().requires_grad_()
    torch.fake_quantize_per_tensor_affine(reference, scale, zero_point.int(), 0, 255).sum().backward()
    torch.testing.assert_close(x.grad, reference.grad, atol=0, rtol=0)
    assert torch.all(x.grad[x < -1.1] == 0)
    assert torch.all(x.grad[(x > -0.9) & (x < 1.9)] == 1)
    assert torch.all(x.grad[x > 2.1] == 0)


def test_without_the_clip_mask_the_gradient_is_not_the_slope() -> None:
    scale, zero_point = grid(-1.0, 2.0)

    def slope(start: float) -> float:
        ends = fake_quantize(torch.tensor([start, start + 0.5]), scale, zero_point, UINT8)
        return round((ends[1] - ends[0]).item() / 0.5, 1)

    for start in (-2.0, 0.3, 3.0):
        x = torch.tensor([start], requires_grad=True)
        fake_quantize(x, scale, zero_point, UINT8).sum().backward()
        assert x.grad.item() == slope(start)
        unmasked = torch.tensor([start], requires_grad=True)
        (unmasked + (fake_quantize(unmasked, scale, zero_point, UINT8) - unmasked).detach()).sum().backward()
        assert (unmasked.grad.item() == slope(start)) == (start == 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_arithmetic_is_float32_in_every_precision(dtype: torch.dtype) -> None:
    scale, zero_point = grid(-3.0, 5.0)
    x = (torch.rand(5000) * 10 - 4).to(dtype).requires_grad_()
    result = fake_quantize(x, scale, zero_point, UINT8)
    result.sum().backward()
    expected = numpy_fake_quantize(x.detach().float().numpy(), -3.0, 5.0)
    assert result.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(result.detach(), torch.from_numpy(expected).to(dtype), atol=0, rtol=0)


def test_half_precision_arithmetic_takes_other_integers() -> None:
    """The pair of the test above: the same formula in bfloat16 rounds many values to a neighbour."""
    scale, zero_point = grid(-3.0, 5.0)
    x = (torch.rand(5000) * 8 - 3).bfloat16()
    right = numpy_quantize(x.float().numpy(), scale.numpy(), int(zero_point), 255)
    careless = (torch.round(x / scale.bfloat16()) + zero_point.bfloat16()).clamp(0, 255).float().numpy()
    careful = fake_quantize(x, scale, zero_point, UINT8).float() / scale + zero_point
    assert np.mean(careless != right) > 0.1
    # A result in bfloat16 has eight bits, enough to tell the steps apart.
    np.testing.assert_array_equal(np.abs(careful.numpy() - right) < 0.75, True)


# --- weights


@pytest.mark.parametrize(("quant_max", "bits"), [(127, 8), (63, 7)])
def test_weights_use_the_whole_symmetric_grid_of_each_channel(quant_max: int, bits: int) -> None:
    weight = torch.randn(5, 3, 3, 3) * torch.tensor([1e-6, 0.1, 1.0, 30.0, 1e4]).view(-1, 1, 1, 1)
    scale = weight_scale(channel_maximum(weight), quant_max)
    expected = np.abs(weight.numpy()).reshape(5, -1).max(1) / np.float32(quant_max)
    np.testing.assert_array_equal(scale.numpy(), expected)
    integers = np.rint(weight.numpy() / expected.reshape(-1, 1, 1, 1))
    assert np.abs(integers).reshape(5, -1).max(1).tolist() == [2 ** (bits - 1) - 1] * 5
    rounded = fake_quantize_weight(weight, scale)
    np.testing.assert_array_equal(rounded.numpy(), integers * expected.reshape(-1, 1, 1, 1))


def test_with_one_scale_for_all_channels_small_channels_vanish() -> None:
    weight = torch.randn(2, 8) * torch.tensor([[1e-3], [1.0]])
    per_channel = fake_quantize_weight(weight, weight_scale(channel_maximum(weight), 127))
    per_tensor = fake_quantize_weight(weight, weight_scale(channel_maximum(weight), 127).amax().expand(2))
    assert torch.count_nonzero(per_channel[0]) == 8
    assert torch.count_nonzero(per_tensor[0]) == 0


def test_seven_bits_fit_the_16_bit_sums_of_older_processors_and_eight_do_not() -> None:
    """Without VNNI two products of an uint8 and an int8 are added with saturation at 32767."""
    weight = torch.full((1, 2), 0.7)
    for quant_max, fits in ((63, True), (127, False)):
        integers = torch.round(weight / weight_scale(channel_maximum(weight), quant_max).view(-1, 1))
        assert ((255 * integers).sum().item() <= np.iinfo(np.int16).max) == fits


def test_weight_gradient_passes_unchanged_in_every_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        weight = torch.randn(4, 6, dtype=dtype, requires_grad=True)
        incoming = torch.randn(4, 6, dtype=dtype)
        rounded = fake_quantize_weight(weight, weight_scale(channel_maximum(weight), 127))
        rounded.backward(incoming)
        assert rounded.dtype == dtype
        torch.testing.assert_close(weight.grad, incoming, atol=0, rtol=0)


def test_weights_in_half_precision_are_rounded_in_float32() -> None:
    weight = torch.randn(16, 200).bfloat16()
    scale = weight_scale(channel_maximum(weight), 127)
    expected = np.rint(weight.float().numpy() / scale.numpy()[:, None]) * scale.numpy()[:, None]
    assert torch.equal(fake_quantize_weight(weight, scale), torch.from_numpy(expected).bfloat16())
    careless = torch.round(weight / scale.bfloat16().view(-1, 1)) * scale.bfloat16().view(-1, 1)
    assert (careless != fake_quantize_weight(weight, scale)).float().mean() > 0.1


def test_dead_channels_stay_zero_and_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(3, 4)
    weight[1] = torch.randn(4)
    rounded = fake_quantize_weight(weight, weight_scale(channel_maximum(weight), 127))
    assert torch.all(rounded[[0, 2]] == 0)
    assert torch.all(rounded[1] != 0)
    monkeypatch.setattr("lightning_quant.numerics.fake_quantize.SMALLEST_SCALE", 0.0)
    assert torch.isnan(fake_quantize_weight(weight, weight_scale(channel_maximum(weight), 127))).any()


# --- folding


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


@pytest.mark.parametrize("value", [1e-3, 0.1, 1.0, 50.0])
def test_ordinary_biases_do_not_stretch_any_scale(value: float) -> None:
    weight = torch.randn(6, 9)
    plain = weight_scale(channel_maximum(weight), 127)
    bias = torch.full((6,), value)
    stretched = weight_scale(channel_maximum(weight), 127, bias=bias, input_scale=torch.tensor(0.02))
    torch.testing.assert_close(plain, stretched, atol=0, rtol=0)


def converted_model(model: nn.Module, x: Tensor) -> nn.Module:
    prepared = prepare(model, (x,), observer="min_max")
    calibrate(prepared, steps_of(prepared, [x]))
    return convert(prepared)
