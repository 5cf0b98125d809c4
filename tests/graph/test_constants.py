"""Weights that forward computes from parameters are constants in evaluation, and rounded as computed in training."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from test_moves import agreement, ready
from torch import Tensor, nn

from lightning_quant.numerics.fake_quantize import fake_quantize_weight

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Standardized(nn.Conv2d):
    """As BiT has it."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-6)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(nn.Conv2d):
    """As NFNet has it in timm: the statistics by a BatchNorm of the weight, and a gain."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * 0.3).view(-1)
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-5)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class EqualizedRate(nn.Linear):
    """As StyleGAN has it; the bias is computed, too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias * 0.01)


class SpectralNorm(nn.Linear):
    """By hand: a step of the power iteration in training."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.register_buffer("u", torch.ones(self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        v = F.normalize(self.weight.t().mv(self.u.clone()), dim=0).detach()
        if self.training:
            self.u.copy_(F.normalize(self.weight.mv(v).detach(), dim=0))
        return F.linear(x, self.weight / torch.dot(self.u.clone(), self.weight.mv(v)), self.bias)


class Merged(nn.Module):
    """Two branches that forward merges into one kernel, with a submodule that makes a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.wide + F.pad(self.narrow.weight, [1, 1, 1, 1]), self.narrow.bias, padding=1)


def convolutional(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()


def dense(first: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(6, 4)).eval()


MODELS = {
    "standardized": lambda: convolutional(Standardized(3, 6, 3)),
    "scaled": lambda: convolutional(Scaled(3, 6, 3)),
    "merged": lambda: convolutional(Merged()),
    "equalized": lambda: dense(EqualizedRate(192, 6)),
    "spectral": lambda: dense(SpectralNorm(192, 6)),
}


@pytest.mark.parametrize("name", MODELS)
def test_computed_weights_are_folded_and_quantized(name: str) -> None:
    torch.manual_seed(0)
    prepared = ready(MODELS[name](), IMAGE)
    assert prepared.plan.coverage == 1.0
    assert prepared.plan.weight_coverage == 1.0
    assert agreement(prepared, IMAGE) > 80


@pytest.mark.parametrize("name", MODELS)
def test_training_rounds_what_was_computed(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    prepared = ready(model, IMAGE)
    model.train()
    with prepared.attached("fake_quantize"):
        result = model(IMAGE)
        result.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.dim() > 1)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_the_rounded_weight_is_the_computed_one() -> None:
    torch.manual_seed(0)
    model = MODELS["standardized"]()
    prepared = ready(model, IMAGE)
    layer = model[0]
    variance, mean = torch.var_mean(layer.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
    weight = (layer.weight - mean) / torch.sqrt(variance + 1e-6)
    identity = next(name for name, operator in prepared.operators.items() if operator.key == "0")
    folded = prepared.folded(identity)
    torch.testing.assert_close(prepared.weight(identity), weight)
    rounded = prepared.weight_integers(identity, folded) * folded.scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(rounded, fake_quantize_weight(weight, folded.scale), atol=1e-6, rtol=0)


def test_weights_that_follow_from_an_input_stay_float_with_the_reason() -> None:
    class Modulated(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * x.mean(), self.bias)

    prepared = ready(nn.Sequential(Modulated(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), IMAGE)
    (row,) = (row for row in prepared.plan.rows if row.name == "0")
    assert (row.action, row.reason) == ("float", "its weight is computed from an input in forward")


def test_weights_that_are_drawn_anew_stay_float() -> None:
    class Noisy(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight + torch.randn_like(self.weight), self.bias)

    prepared = ready(nn.Sequential(Noisy(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), IMAGE)
    assert {row.name: row.action for row in prepared.plan.rows}["2"] == "int8"
    assert prepared.plan.coverage < 1
