"""Kernels of fake quantization against the CPU's passes.

With `TRITON_INTERPRET=1` Triton's interpreter runs them on the CPU; with a GPU they run there. Without Triton the plain
passes of devices are held to the same bound.
"""

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_quant.numerics import kernels
from lightning_quant.numerics.fake_quantize import _OnDevice, affine_parameters, fake_quantize
from lightning_quant.numerics.grid import UINT8

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())
DEVICE = torch.device("cuda" if HAS_TRITON and not INTERPRETED else "cpu")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton and a GPU, or TRITON_INTERPRET=1")
WAYS = ["plain", pytest.param("triton", marks=[needs_triton, pytest.mark.gpu])]


def triton_alone(test: Any) -> Any:
    return needs_triton(pytest.mark.gpu(test))


def rounded(way: str, x: Tensor, grid: tuple[Tensor, Tensor], relu: bool) -> Tensor:
    if way == "plain":
        return _OnDevice.apply(x, *grid, 0, 255, relu)
    # Among others, as edges are: a kernel takes its row out of tables.
    scales, zero_points = (torch.stack([p + 1, p, p - 1]).to(x.device) for p in grid)
    return kernels.round_values(x, kernels.EdgeRows(scales, zero_points, 1, UINT8, relu))


def values(dtype: torch.dtype, grid: tuple[Tensor, Tensor]) -> Tensor:
    """Return values on, between and beyond the grid, ties among them, in channels_last."""
    ties = (torch.arange(-300, 300) + 0.5) * grid[0]
    x = torch.cat([ties, torch.randn(3 * 8 * 8 * 8 - 600, generator=torch.Generator().manual_seed(0)) * 2])
    return x.view(3, 8, 8, 8).to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ends", [(-1.3, 2.9), (0.0, 6.0), (-3.7, 0.0)])
def test_integers_and_gradients_are_those_of_the_cpu(
    ends: tuple[float, float], dtype: torch.dtype, relu: bool, way: str
) -> None:
    grid = affine_parameters(*map(torch.tensor, ends), UINT8)
    x = values(dtype, grid)
    here, there = x.clone().requires_grad_(), x.clone().to(DEVICE if way == "triton" else "cpu").requires_grad_()
    expected = on_host(here, grid, relu)
    actual = rounded(way, there, grid, relu)
    incoming = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected.backward(incoming)
    actual.backward(incoming.to(there.device))

    assert actual.dtype == dtype
    assert actual.stride() == x.stride()
    torch.testing.assert_close(there.grad.cpu(), here.grad, atol=0, rtol=0)
    if dtype == torch.bfloat16 and INTERPRETED and way == "triton":
        # The interpreter cuts the last bits of a bfloat16 off where hardware rounds.
        torch.testing.assert_close(actual.cpu(), expected, atol=0, rtol=2**-7)
        return
    # The bound: other integers only where one rounding of float32 lies between the value and a tie.
    ratio = x.float() / grid[0]
    near_tie = ((ratio - ratio.floor()) - 0.5).abs() <= torch.finfo(torch.float32).eps * ratio.abs()
    differs = actual.cpu() != expected
    assert not bool((differs & ~near_tie).any())
    # Division is IEEE's everywhere today, so that there are none at all.
    assert not bool(differs.any())


def on_host(x: Tensor, grid: tuple[Tensor, Tensor], relu: bool) -> Tensor:
    return fake_quantize(x, grid[0].item(), grid[1].item(), UINT8, relu=relu)


@triton_alone
@pytest.mark.parametrize("relu", [False, True])
def test_extremes_are_seen_in_the_same_pass(relu: bool) -> None:
    grid = affine_parameters(torch.tensor(-1.0), torch.tensor(2.0), UINT8)
    x = torch.randn(5, 777, device=DEVICE)
    seen = torch.full((3, 2), -torch.inf, device=DEVICE)
    kernels.round_values(x, kernels.EdgeRows(*(p.to(DEVICE) for p in grid), 0, UINT8, relu, seen, 1))
    rounded = x.relu() if relu else x

    assert (-seen[1, 0]).item() == rounded.min().item()
    assert seen[1, 1].item() == rounded.max().item()
    kernels.observe_values(3 * x, seen, 1)
    assert seen[1, 1].item() == (3 * x).max().item()
    assert not torch.isfinite(seen[[0, 2]]).any()


@triton_alone
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_lost(value: float) -> None:
    x = torch.randn(3000, device=DEVICE)
    x[1234] = value
    seen = torch.full((1, 2), -torch.inf, device=DEVICE)
    kernels.observe_values(x, seen, 0)

    assert not bool(torch.isfinite(seen).all())


@triton_alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_are_rounded_in_one_launch(dtype: torch.dtype) -> None:
    shapes: list[Any] = [(8, 3, 3, 3), (16, 8, 3, 3), (5, 1300), (4, 1, 3, 3)]
    weights = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    weights[1] = weights[1].to(memory_format=torch.channels_last)
    assert kernels.are_rows(weights)
    rows = kernels.rows_of(weights)
    maxima = rows.maxima()

    assert torch.equal(maxima, torch.cat([w.float().abs().flatten(1).amax(1) for w in weights]))
    scales = maxima / 127
    for weight, result, scale in zip(
        weights, rows.rounded(scales, torch.float32), scales.split([len(w) for w in weights]), strict=True
    ):
        scale = scale.view(-1, *[1] * (weight.dim() - 1))
        assert result.stride() == weight.stride()
        assert torch.equal(result, torch.round(weight.float() / scale) * scale)


@triton_alone
@pytest.mark.parametrize("relu", [False, True])
def test_kernels_that_are_compiled_already_serve_other_sizes_and_places(relu: bool) -> None:
    grid = affine_parameters(torch.tensor(-1.0), torch.tensor(2.0), UINT8)
    for size in (4096, 4096, 5000, 4097, 1, 48, 16, 7):
        values = torch.randn(size + 1)
        for start in (0, 1):  # the second does not lie at a multiple of 16 bytes
            x = values.to(DEVICE)[start : start + size].requires_grad_()
            here = values[start : start + size].clone().requires_grad_()
            actual, expected = rounded("triton", x, grid, relu), on_host(here, grid, relu)
            actual.sum().backward()
            expected.sum().backward()

            assert torch.equal(actual.cpu(), expected)


@triton_alone
def test_gradients_of_gradients_pass() -> None:
    grid = affine_parameters(torch.tensor(-1.0), torch.tensor(2.0), UINT8)
    x = torch.linspace(-3, 3, 50, device=DEVICE).requires_grad_()
    (first,) = torch.autograd.grad((rounded("triton", x, grid, False) * x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)

    assert torch.equal(second, 2 * ((x > -1) & (x < 2)).float())
