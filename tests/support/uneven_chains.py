"""Chains of layers whose channels are very different, and calls of them."""

import torch
import torch.nn.functional as F  # noqa: N812
from models import with_statistics
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.prepare import prepare
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.simulate.prepared import Prepared


class Chain(nn.Module):
    """Expand, depthwise without padding, project: an inverted residual block with very different channels."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 12, 1, bias=False),
            nn.BatchNorm2d(12),
            activation(),
            nn.Conv2d(12, 12, 3, groups=12, bias=False),
            nn.BatchNorm2d(12),
            activation(),
            nn.Conv2d(12, 4, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


def uneven(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = with_statistics(Chain(activation)).eval()
    with torch.no_grad():
        model.layers[1].weight.mul_(torch.logspace(-2, 0.7, 12))
        model.layers[4].weight.mul_(torch.logspace(0.5, -1.5, 12))
    return model


def images(number: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def prepared_chain(activation: type[nn.Module]) -> tuple[nn.Module, Prepared, list]:
    model = uneven(activation)
    calls = [((x,), {}) for x in images().split(4)]
    prepared = prepare(model, (images(4),), recipe=Recipe(align_channels=False), observer="mse")
    calibrate(prepared, steps_of(prepared, [call[0] for call in calls]))
    return model, prepared, calls


def rescaled_function(prepared: Prepared, x: Tensor, clip: float) -> Tensor:
    """Compute the chain in float from the rescaled layers alone, with one clip per channel."""
    names = [":layers.0", ":layers.3", ":layers.6"]
    edges = [":layers.2", ":layers.5"]
    for name, edge, groups in zip(names[:2], edges, (1, 12), strict=True):
        layer, channels = prepared.layers[name], prepared.channels[edge]
        x = F.conv2d(x, layer.weight, layer.bias, groups=groups)
        bound = ((clip - channels.shift) / channels.factor).view(1, -1, 1, 1)
        x = torch.minimum(x.clamp(min=0), bound)
    layer = prepared.layers[names[2]]
    return F.conv2d(x, layer.weight, layer.bias)


def smooth_like(x: Tensor, seed: int) -> Tensor:
    """Return values whose neighbours resemble each other; errors in white noise cannot make up for each other."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return 0.2 * noise + noise.flatten(1).cumsum(1).view(x.shape) / 3


def climbed(steps: tuple[str, ...], **fields) -> tuple[nn.Module, Prepared, list]:
    model = uneven(nn.ReLU6)
    calls = [((x,), {}) for x in images(64).split(8)]
    recipe = Recipe(accuracy_steps=steps, align_channels=False, **fields)
    prepared = prepare(model, (images(8),), recipe=recipe, observer="mse")
    calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
    return model, prepared, calls


class Normalized(nn.Module):
    """A LayerNorm with two loud features, and two linear layers that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.other = nn.LayerNorm(32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.norm.weight = nn.Parameter(torch.ones(32).index_fill(0, torch.tensor([3, 20]), 40.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.one(x) * torch.sigmoid(self.other(x))
