import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from lightning_quant.numerics.fake_quantize import (
    affine_parameters,
    channel_maximum,
    fake_quantize,
    fake_quantize_weight,
    weight_scale,
)
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


@pytest.mark.parametrize("value", [1e-3, 0.1, 1.0, 50.0])
def test_ordinary_biases_do_not_stretch_any_scale(value: float) -> None:
    weight = torch.randn(6, 9)
    plain = weight_scale(channel_maximum(weight), 127)
    bias = torch.full((6,), value)
    stretched = weight_scale(channel_maximum(weight), 127, bias=bias, input_scale=torch.tensor(0.02))
    torch.testing.assert_close(plain, stretched, atol=0, rtol=0)
