"""Weights that are trained through rounding are drawn to their integers, more so towards the end."""

import torch
from torch import nn

from lightning_quant.export.prepare import prepare
from lightning_quant.recipe.recipe import get
from lightning_quant.simulate.damping import add_damping_gradient, growing


def test_damping_grows_from_nothing_to_all_of_it() -> None:
    shares = [growing(position) for position in (-1.0, 0.0, 0.25, 0.5, 1.0, 2.0)]
    assert shares[:2] == [0.0, 0.0]
    assert shares[-2:] == [1.0, 1.0]
    assert shares == sorted(shares)


def test_the_gradient_is_that_of_the_distance_to_the_integers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    prepared = prepare(net, (torch.randn(4, 6),), recipe=get("int4_weights"))
    prepared.begin_learning()
    prepared.set_phase("observe")
    with prepared.attached("observe", observing=True):
        net(torch.randn(4, 6))
    prepared.set_phase("fake_quantize")
    with prepared.attached("fake_quantize"):
        net(torch.randn(4, 6)).sum().backward()
    assert prepared.learned_steps is not None
    weight = net[0].weight
    weight.grad, net[2].weight.grad = torch.zeros_like(weight), torch.zeros_like(net[2].weight)

    add_damping_gradient(prepared, {id(weight)}, 0.5)

    leaf = weight.detach().clone().requires_grad_()
    step = prepared.learned_steps.step_of(":0", weight, 7).detach()[:, None]
    clipped = leaf.clamp(-7 * step, 7 * step)
    (0.5 * (clipped - (clipped / step).round().detach() * step).square().sum()).backward()
    torch.testing.assert_close(weight.grad, leaf.grad, atol=1e-6, rtol=1e-4)
    assert weight.grad.any()
    # Another optimizer's weights are left to it.
    assert not net[2].weight.grad.any()
