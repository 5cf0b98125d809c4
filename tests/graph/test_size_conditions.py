"""Forwards that compute with sizes, and branch on them."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from test_moves import agreement, ready
from torch import Tensor, nn

from lightning_quant.export.prepare import prepare
from lightning_quant.graph import trace as tracing

IMAGE = torch.randn(2, 3, 9, 12, generator=torch.Generator().manual_seed(0))


class Same(nn.Conv2d):
    """Pads as TensorFlow does, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.size()[-2:]
        tall = max((math.ceil(height / self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - height, 0)
        wide = max((math.ceil(width / self.stride[1]) - 1) * self.stride[1] + self.kernel_size[1] - width, 0)
        x = F.pad(x, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class SameIfNeeded(nn.Conv2d):
    """The same with a branch, as EfficientNets have it."""

    def forward(self, x: Tensor) -> Tensor:
        sizes, kernel = x.size()[-2:], self.weight.size()[-2:]
        out = [math.ceil(size / stride) for size, stride in zip(sizes, self.stride, strict=True)]
        tall = max((out[0] - 1) * self.stride[0] + kernel[0] - sizes[0], 0)
        wide = max((out[1] - 1) * self.stride[1] + kernel[1] - sizes[1], 0)
        if tall > 0 or wide > 0:
            x = F.pad(x, [wide // 2, wide - wide // 2, tall // 2, tall - tall // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride)


class Depthwise(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, groups=x.shape[1])


@pytest.mark.parametrize("layer", [Same, SameIfNeeded])
def test_padding_computed_from_sizes_is_part_of_the_graph(layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer(3, 8, 3, 2), nn.ReLU(), layer(8, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    prepared = ready(model, IMAGE)
    assert prepared.plan.coverage == 1.0
    assert agreement(prepared, IMAGE) > 80


def test_numbers_of_channels_may_come_from_shapes() -> None:
    torch.manual_seed(0)
    prepared = ready(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Depthwise(8, 8, 3, groups=8)), IMAGE)
    assert prepared.plan.coverage == 1.0
    assert agreement(prepared, IMAGE) > 80


def test_calls_of_other_sizes_take_their_own_branches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SameIfNeeded(3, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    prepared = ready(model, IMAGE)
    even = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(even), model(IMAGE)
        with prepared.attached("frozen"):
            results = [model(even), model(IMAGE), model(even)]
    assert [tuple(result.shape) for result in results] == [(2, 2, 4, 4), (2, 2, 5, 6), (2, 2, 4, 4)]
    torch.testing.assert_close(results[0], expected[0], atol=0.3, rtol=0)
    torch.testing.assert_close(results[1], expected[1], atol=0.3, rtol=0)


def test_a_branch_on_the_number_of_samples_is_no_part_of_a_graph() -> None:
    class ByBatch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] > 1 else x

    model = nn.Sequential(nn.Conv2d(3, 4, 1), ByBatch(), nn.Conv2d(4, 2, 1))
    prepared = prepare(model.eval(), (IMAGE,))
    assert next(iter(prepared.islands.values())).opaque == {"1"}


def test_planning_takes_as_many_traces_with_many_untraceable_modules_as_with_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.mean() > 5 else x

    class WritesByIndex(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x[:, 0] = 0
            return x

    def traces_of(number: int) -> int:
        made: list[object] = []
        original = tracing._Tracer
        with monkeypatch.context() as patch:
            patch.setattr(tracing, "_Tracer", lambda *args: made.append(args) or original(*args))
            blocks = [block for _ in range(number) for block in (Untraceable(), WritesByIndex())]
            prepare(nn.Sequential(nn.Conv2d(3, 4, 1), *blocks, nn.Conv2d(4, 2, 1)).eval(), (IMAGE,), trains=False)
        return len(made)

    assert traces_of(6) == traces_of(1)
