import pytest
import torch
from lightning_models import decibels

from lightning_quant.layers import storage
from lightning_quant.layers.storage import dequantize, quantize


def test_int8_has_a_scale_for_each_row() -> None:
    weight = torch.randn(6, 4, 3)
    weight[2] *= 1e6
    stored, scale = quantize(weight, "int8", 0)

    assert stored.dtype == torch.int8
    assert stored.shape == weight.shape
    torch.testing.assert_close(scale, torch.tensor([row.abs().max() / 127 for row in weight]))
    assert [int(row.abs().max()) for row in stored] == [127] * 6
    restored = stored.double() * scale.double().view(-1, 1, 1)
    assert ((restored - weight.double()).abs() <= 0.5001 * scale.double().view(-1, 1, 1)).all()
    torch.testing.assert_close(dequantize(stored, scale).double(), restored)
    # One scale for the tensor loses the other rows.
    step = weight.abs().max() / 127
    assert decibels(weight[:2], ((weight / step).round() * step)[:2]) < 1
    assert decibels(weight[:2], restored[:2].float()) > 35


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 1e38, -3e38])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_of_one_value(value: float, kind: str) -> None:
    weight = torch.full((3, 32), value)
    restored = dequantize(*quantize(weight, kind, 32))

    assert restored.isfinite().all()
    if abs(value) > 1e-36 or value == 0:
        torch.testing.assert_close(restored, weight, rtol=1e-6, atol=0.0)


def test_int4_keeps_the_largest_value_of_each_group() -> None:
    weight = torch.randn(5, 64)
    weight[1, 3], weight[1, 40] = 50.0, -70.0
    stored, scale = quantize(weight, "int4", 32)

    assert stored.shape == (5, 32)
    assert scale.shape == (5, 2)
    restored = dequantize(stored, scale)
    torch.testing.assert_close(restored[1, [3, 40]], torch.tensor([50.0, -70.0]))
    groups, steps = (weight - restored).view(5, 2, 32), scale.abs().unsqueeze(2)
    # On the side of the extreme the grid ends at 8 steps, on the other at 7.
    assert (groups.abs() <= 1.0001 * steps).all()
    assert decibels(weight[0], restored[0]) > 15


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision(kind: str) -> None:
    weight = torch.randn(5, 6)
    stored, scale = quantize(weight, kind, 0)

    assert scale is None
    assert stored.dtype == getattr(torch, kind)
    assert torch.equal(dequantize(stored, scale), weight.to(getattr(torch, kind)).float())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_blocks_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 64)
    whole = quantize(weight, kind, 32)
    monkeypatch.setattr(storage, "_BLOCK", 130)
    parts = quantize(weight, kind, 32)

    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


def test_weights_of_other_types_and_layouts() -> None:
    weight = torch.randn(32, 8)
    stored, scale = quantize(weight.t(), "int8", 0)

    assert torch.equal(stored, quantize(weight.t().contiguous(), "int8", 0)[0])
    assert quantize(weight.double(), "int8", 0)[1].dtype == torch.float32
    assert quantize(weight.bfloat16(), "int8", 0)[1].dtype == torch.float32
    assert scale.shape == (8,)
