"""The operators against plain float formulas that are written out here."""

import gc
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from lightning_models import decibels
from torch import Tensor

from lightning_quant.layers import kernels

ours = torch.ops.lightning_quant


def int8_weight(out_features: int = 24, in_features: int = 32, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return integers that use the whole grid, and a scale for each row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    return weight, torch.rand(out_features, generator=generator) * 0.01 + 1e-3


def in_float64(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the product with the dequantized weight, without any rounding of the rows."""
    product = x.double() @ (weight.double() * scale.double().unsqueeze(1)).T
    return product if bias is None else product + bias.double()


def rounded_rows(x: Tensor) -> Tensor:
    """Return rows on a grid of 255 steps about the middle of their range, with zero on it, in float64."""
    rows = x.double()
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    step, middle = (high - low) / 254, (high + low) / 2
    offset = (middle / step).round()
    return torch.where(step > 0, (((rows / step).round() - offset).clamp(-127, 127) + offset) * step, rows)


def by_unpacking(packed: Tensor, scale: Tensor) -> Tensor:
    """Return the float64 weight of packed int4, value by value in Python."""
    groups, columns = scale.shape[1], 2 * packed.shape[1]
    size = columns // groups
    rows = []
    for row, scales in zip(packed.tolist(), scale.tolist(), strict=True):
        nibbles = [value for byte in row for value in ((byte % 256) % 16, (byte % 256) // 16)]
        rows.append([(nibble - 8) * scales[i // size] for i, nibble in enumerate(nibbles)])
    return torch.tensor(rows, dtype=torch.float64)


# --- dynamic


@pytest.mark.parametrize("shape", [(32,), (1, 32), (7, 32), (2, 3, 32), (1, 1, 1, 32)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_dynamic_is_the_product_of_rounded_rows(shape: tuple[int, ...], with_bias: bool) -> None:
    weight, scale = int8_weight()
    x, bias = torch.randn(shape) + 0.3, torch.randn(24) if with_bias else None
    result = ours.linear_dynamic(x, weight, scale, bias)

    assert result.shape == (*shape[:-1], 24)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), in_float64(rounded_rows(x), weight, scale, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [0.0, 0.13, 2.0, -1e3])
def test_zero_is_on_the_grid_of_every_row(shift: float) -> None:
    weight, scale = int8_weight()
    x = torch.randn(50, 32) + shift
    x[:, ::2] = 0
    weight[:, 1::2] = 0
    result = ours.linear_dynamic(x, weight, scale, None)
    one_step = (x.amax(1) - x.amin(1)).unsqueeze(1) / 254 * (weight.float().abs() * scale.unsqueeze(1)).sum(1)
    assert (result.abs() < 1e-3 * one_step).all()


def test_dynamic_rows_have_ranges_of_their_own() -> None:
    weight, scale = int8_weight()
    x = torch.randn(6, 32)
    alone = ours.linear_dynamic(x, weight, scale, None)
    x[2] *= 1e6
    beside = ours.linear_dynamic(x, weight, scale, None)
    quiet = [0, 1, 3, 4, 5]

    assert torch.equal(alone[quiet], beside[quiet])
    assert decibels(in_float64(x, weight, scale)[quiet], beside[quiet].double()) > 35
    # One range for the tensor, as textbook kernels have it, loses them.
    step = x.abs().max() / 127
    per_tensor = in_float64((x / step).round().clamp(-127, 127) * step, weight, scale)
    assert decibels(in_float64(x, weight, scale)[quiet], per_tensor[quiet]) < 1


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(torch.zeros(32), id="zeros"),
        pytest.param(torch.full((32,), 5.0), id="constant"),
        pytest.param(torch.full((32,), -3e38), id="constant and huge"),
        pytest.param(torch.tensor([1e-30] * 16 + [-1e-30] * 16), id="tiny"),
        pytest.param(torch.tensor([1e-42] * 16 + [0.0] * 16), id="subnormal"),
        pytest.param(torch.tensor([1e30] * 16 + [-1e30] * 16), id="huge"),
        pytest.param(torch.tensor([3e38, -3e38] + [0.0] * 30), id="wider than float32"),
        pytest.param(torch.tensor([1e4] + [1e4 + 1] * 31), id="far from zero"),
    ],
)
def test_dynamic_awkward_rows(row: Tensor) -> None:
    weight, scale = int8_weight()
    scale = scale * 1e-2
    x = torch.stack([torch.linspace(-1, 1, 32), row])
    result = ours.linear_dynamic(x, weight, scale, None).double()
    expected = in_float64(rounded_rows(x), weight, scale)

    assert result.isfinite().all()
    assert decibels(expected[0], result[0]) > 60
    tolerance = 1e-4 * (row.abs().double() @ (weight.abs().double() * scale.double()[:, None]).T) + 1e-30
    assert ((result[1] - expected[1]).abs() <= tolerance).all()


def test_no_rows() -> None:
    weight, scale = int8_weight()
    for operator in (ours.linear_dynamic, ours.linear_weight_only):
        assert operator(torch.randn(0, 32), weight, scale, torch.zeros(24)).shape == (0, 24)
        assert operator(torch.randn(2, 0, 32), weight, scale, None).shape == (2, 0, 24)


@pytest.mark.parametrize("name", ["linear_dynamic", "linear_weight_only"])
def test_memory_layout_does_not_matter(name: str) -> None:
    operator = getattr(ours, name)
    weight, scale = int8_weight()
    x, bias = torch.randn(3, 5, 32), torch.randn(24)
    expected = operator(x, weight, scale, bias)
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    wide = torch.zeros(24, 64, dtype=torch.int8)
    wide[:, ::2] = weight

    assert not strided.is_contiguous()
    torch.testing.assert_close(operator(strided, weight, scale, bias), expected)
    torch.testing.assert_close(operator(x, weight.t().contiguous().t(), scale, bias), expected)
    torch.testing.assert_close(operator(x, wide[:, ::2], scale, bias), expected)
    torch.testing.assert_close(operator(x.expand(3, 5, 32)[:, :, :], weight, scale, bias.clone()), expected)
    assert torch.equal(bias, bias.clone())


@pytest.mark.parametrize("name", ["linear_dynamic", "linear_weight_only"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_float_types(name: str, dtype: torch.dtype) -> None:
    weight, scale = int8_weight()
    x = torch.randn(5, 32).to(dtype)
    result = getattr(ours, name)(x, weight, scale, torch.zeros(24))

    assert result.dtype == dtype
    assert decibels(in_float64(x, weight, scale), result.double()) > 30


@pytest.mark.parametrize("name", ["linear_dynamic", "linear_weight_only"])
def test_inference_mode_and_gradient_modes(name: str) -> None:
    weight, scale = int8_weight()
    x = torch.randn(5, 32)
    expected = getattr(ours, name)(x, weight, scale, None)
    with torch.inference_mode():
        inside, inside_scale = int8_weight()
        assert torch.equal(getattr(ours, name)(x, inside, inside_scale, None), expected)
    with torch.enable_grad():
        assert torch.equal(getattr(ours, name)(x.requires_grad_(), weight, scale, None).detach(), expected)


# --- packed weights of onednn


def test_weight_that_changes_in_place_is_packed_again() -> None:
    weight, scale = int8_weight()
    other, other_scale = int8_weight(seed=2)
    x = torch.randn(5, 32)
    ours.linear_dynamic(x, weight, scale, None)
    weight.copy_(other)
    torch.testing.assert_close(
        ours.linear_dynamic(x, weight, scale, None), ours.linear_dynamic(x, other.clone(), scale, None)
    )
    # The scale is no part of what is packed. Rows far from zero need it for their middle, too.
    scale.copy_(other_scale)
    torch.testing.assert_close(
        ours.linear_dynamic(x + 9, weight, scale, None), ours.linear_dynamic(x + 9, other.clone(), other_scale, None)
    )


def test_freed_weights_leave_the_cache() -> None:
    gc.collect()
    before = len(kernels._PACKED)
    weight, scale = int8_weight()
    for _ in range(3):
        ours.linear_dynamic(torch.randn(5, 32), weight, scale, None)
    assert len(kernels._PACKED) == before + 1
    del weight
    gc.collect()
    assert len(kernels._PACKED) == before


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = int8_weight()
    x, bias = torch.randn(5, 32) + 1, torch.randn(24)
    with_onednn = ours.linear_dynamic(x, weight, scale, bias)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)

    torch.testing.assert_close(ours.linear_dynamic(x, weight, scale, bias), with_onednn, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("instructions", ["DEFAULT", "AVX512_CORE", "AVX2"])
def test_large_integers_on_every_processor(instructions: str) -> None:
    """Kernels without VNNI add two products in 16 bits; types without a kernel end in a reference, in seconds."""
    code = """
import torch
import lightning_quant.layers.kernels
x, weight = torch.full((5, 64), 1.0), torch.full((16, 64), 127, dtype=torch.int8)
x[:, :2] = -1.0
print(torch.ops.lightning_quant.linear_dynamic(x, weight, torch.full((16,), 1 / 127), None).unique().tolist())
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "ONEDNN_VERBOSE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    *log, result = run.stdout.splitlines()
    assert json.loads(result) == pytest.approx([60.0])
    assert not [line for line in log if ",matmul,ref" in line]


# --- weights only


@pytest.mark.parametrize("block", [1, 64, 2**18])
def test_weight_only_is_the_product_with_the_dequantized_weight(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", block)
    weight, scale = int8_weight()
    x, bias = torch.randn(2, 3, 32), torch.randn(24)
    torch.testing.assert_close(
        ours.linear_weight_only(x, weight, scale, bias).double(),
        in_float64(x, weight, scale, bias),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("block", [1, 64, 2**18])
def test_four_bits(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", block)
    integers = torch.randint(-8, 8, (24, 32), dtype=torch.int8)
    scale, bias, x = torch.rand(24, 4) - 0.5, torch.randn(24), torch.randn(2, 3, 32)
    expected = x.double() @ by_unpacking(kernels.pack(integers), scale).T + bias.double()
    torch.testing.assert_close(
        ours.linear_weight_only(x, kernels.pack(integers), scale, bias).double(), expected, rtol=1e-4, atol=1e-5
    )


def test_packing_keeps_every_pair_of_values() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8)
    integers = torch.cartesian_prod(values, values).reshape(16, 32)
    packed = kernels.pack(integers)

    assert packed.shape == (16, 16)
    assert packed.dtype == torch.int8
    assert torch.equal(kernels.unpack(packed, torch.ones(16, 1)), integers.float())
    assert torch.equal(by_unpacking(packed, torch.ones(16, 1)), integers.double())


# --- in exported programs


@pytest.mark.parametrize("name", ["linear_dynamic", "linear_weight_only"])
def test_operators_stay_whole_in_programs(name: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, scale: Tensor) -> Any:
            return getattr(ours, name)(x, weight, scale, None)

    weight, scale = int8_weight()
    shapes = ({0: torch.export.Dim.DYNAMIC}, None, None)
    program = torch.export.export(Layer(), (torch.randn(5, 32), weight, scale), dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]

    assert targets == [f"lightning_quant.{name}.default"]
    x = torch.randn(9, 32)
    assert torch.equal(program.module()(x, weight, scale), getattr(ours, name)(x, weight, scale, None))
