"""Weights are rounded as they are when a run begins."""

from typing import Any

import torch
from residual_nets import LARGE, observing_residual
from torch import nn


def test_weights_written_through_data_are_those_that_are_rounded() -> None:
    model, prepared = observing_residual()
    prepared.set_phase("fake_quantize")
    model(LARGE)
    before = model(LARGE)
    version = model.conv1.weight._version
    model.conv1.weight.data.mul_(-1)

    assert model.conv1.weight._version == version
    assert not torch.equal(model(LARGE), before)


def test_a_layer_with_a_hook_reads_the_weight_that_the_hook_leaves() -> None:
    model, prepared = observing_residual()
    prepared.set_phase("fake_quantize")
    model(LARGE)
    expected = model(LARGE)

    def double(module: nn.Module, args: Any) -> None:
        module.weight.data.mul_(2)

    model.conv1.weight.data.mul_(0.5)
    model.conv1.register_forward_pre_hook(double)
    prepared.observing = False
    torch.testing.assert_close(model(LARGE), expected)
