"""Tensors that share a factor per channel, and the layers that take it up."""

import math

import torch
from torch import Tensor, nn
from uneven_chains import prepared_chain

from lightning_quant.calibrate.groups import is_depthwise, scaling_groups
from lightning_quant.export.prepare import prepare


def test_a_clipped_tensor_between_two_layers_is_a_group_with_its_clip() -> None:
    _, prepared, _ = prepared_chain(nn.ReLU6)
    first, second, image = sorted(scaling_groups(prepared), key=lambda group: group.from_float)

    assert (first.producers, first.consumers) == ((":layers.0",), (":layers.3",))
    assert (second.producers, second.consumers) == ((":layers.3",), (":layers.6",))
    assert (first.clip, first.channels, first.axis, first.activated) == (6.0, 12, 1, True)
    assert (image.from_float, image.producers, image.consumers, image.clip) == (True, (), (":layers.0",), math.inf)


class Sum(nn.Module):
    """What one layer writes is added to what another does, behind which a pool stands, and both are read."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.pool, self.last = nn.MaxPool2d(kernel), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(self.one(x) + self.two(x)))


def test_additions_and_pools_let_factors_through() -> None:
    prepared = prepare(Sum(2).eval(), (torch.randn(2, 3, 8, 8),))
    (group,) = [group for group in scaling_groups(prepared) if group.producers]

    assert set(group.producers) == {":one", ":two"}
    assert group.consumers == (":last",)
    assert (group.links, group.padded, group.clip, group.activated) == (2, True, math.inf, False)


class Product(nn.Module):
    """A product of two tensors takes no factor of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.one(x) * self.two(x))


def test_what_a_product_reads_is_in_no_group() -> None:
    prepared = prepare(Product().eval(), (torch.randn(5, 6),))
    assert all(not group.producers for group in scaling_groups(prepared))


def test_what_is_added_before_rounding_is_in_no_group() -> None:
    """OpenVINO's convolutions add another tensor to their sums, which are no edge."""
    prepared = prepare(Sum(2).eval(), (torch.randn(2, 3, 8, 8),), runtime="openvino")
    assert all(":one" not in group.producers for group in scaling_groups(prepared) if len(group.producers) > 1)


class Flattening(nn.Module):
    """A BatchNorm behind a linear layer, with reshapes between, read in float."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y = self.norm(y.flatten(0, 1)).reshape_as(y)
        return self.head(torch.sin(y))


def test_what_is_moved_and_read_in_float_is_in_no_group() -> None:
    prepared = prepare(Flattening().eval(), (torch.randn(2, 5, 6),), recipe="int8")
    assert prepared.operators[":linear"].moved
    assert not prepared.operators[":linear"].quantized_output
    assert {reader for group in scaling_groups(prepared) for reader in group.consumers} == {":linear", ":head"}


def test_scaling_costs_nothing_where_a_reader_has_a_channel_for_each_output() -> None:
    _, prepared, _ = prepared_chain(nn.ReLU)
    groups = {group.consumers: group for group in scaling_groups(prepared)}
    assert is_depthwise(prepared, groups[(":layers.3",)])
    assert not is_depthwise(prepared, groups[(":layers.6",)])
