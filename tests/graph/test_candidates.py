"""What is taken up by an integer operator beside it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import PaddedNet
from prepared_graphs import evaluated, noise
from torch import Tensor, nn

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Padded(nn.Module):
    """Pads between two convolutions."""

    def __init__(self, pad: Any) -> None:
        super().__init__()
        self.conv1, self.conv2, self.pad = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 3), pad

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.pad(self.conv1(x)))


@pytest.mark.parametrize(
    "pad",
    [
        nn.ZeroPad2d((1, 0, 2, 1)),
        nn.ConstantPad2d(1, 0.0),
        lambda x: F.pad(x, (1, 1, 1, 1)),
        lambda x: F.pad(x, (0, 1), "constant", 0),
    ],
)
def test_padding_with_zeros_is_part_of_the_convolution(pad: Any) -> None:
    model = Padded(pad).eval()
    prepared = evaluated(model, IMAGE)
    conv2 = prepared.operators[":conv2"]
    assert conv2.pad
    assert conv2.inputs == ("conv1",)
    assert noise(model, IMAGE) > 25


@pytest.mark.parametrize(
    "pad",
    [
        nn.ConstantPad2d(1, 0.7),
        nn.ReflectionPad2d(1),
        lambda x: F.pad(x, (1, -1, 1, 1)),
        lambda x: F.pad(x, (1, 1, 1, 1), value=0.7),
        lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
        lambda x: F.pad(x, (0, 0, 0, 0, 3, 3))[:, 3:-3],
    ],
)
def test_other_padding_is_not_part_of_the_convolution(pad: Any) -> None:
    model = Padded(pad).eval()
    assert not evaluated(model, IMAGE).operators[":conv2"].pad
    assert noise(model, IMAGE) > 25


def test_a_subclassed_convolution_that_pads_is_a_convolution() -> None:
    model = PaddedNet().eval()
    x = torch.randn(4, 3, 9, 9)
    prepared = evaluated(model, x)
    operators = list(prepared.operators.values())
    assert [operator.kind for operator in operators] == ["conv2d", "conv2d"]
    assert [bool(operator.pad) for operator in operators] == [True, True]
    assert [bool(operator.activation) for operator in operators] == [True, True]
    assert operators[0].weight == "conv1.weight"
    assert prepared.plan.coverage == 1.0


def test_same_padding_computed_from_the_size_is_right() -> None:
    class SamePadConv2d(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            height, width = x.shape[-2:]
            rows = max((-(height // -self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - height, 0)
            columns = max((-(width // -self.stride[1]) - 1) * self.stride[1] + self.kernel_size[1] - width, 0)
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
            return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    model = nn.Sequential(SamePadConv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    assert noise(model, IMAGE) > 25
    prepared = evaluated(model, IMAGE)
    for size in (7, 9):
        image = torch.randn(2, 3, size, size)
        with torch.no_grad():
            expected = model(image)
            with prepared.attached("observe"):
                torch.testing.assert_close(model(image), expected, atol=0, rtol=0)
