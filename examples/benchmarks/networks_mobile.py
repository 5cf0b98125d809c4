"""More networks that classify images: those made for small devices, and attention over images."""

import torch
import torch.nn.functional as F  # noqa: N812
from network_cases import Case, images
from networks_images import Residual, conv_norm, head
from torch import Tensor, nn


class _Shuffle(nn.Module):
    """Half of the channels pass by. Source: Ma et al. 2018, "ShuffleNet V2"."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        depthwise = conv_norm(half, half, 3, groups=half, act=None)
        self.branch = nn.Sequential(conv_norm(half, half, 1), depthwise, conv_norm(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        y = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet() -> Case:
    """Chunks and shuffled channels."""
    stages = [conv_norm(3, 32, 3, 2), _Shuffle(32), _Shuffle(32), conv_norm(32, 64, 3, 2), _Shuffle(64), _Shuffle(64)]
    return Case(nn.Sequential(*stages, head(64)), images())


class _Ghost(nn.Module):
    """Half of the channels are filtered copies of the others. Source: Han et al. 2020, "GhostNet"."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.primary = conv_norm(i, o // 2, 1)
        self.cheap = conv_norm(o // 2, o // 2, 3, groups=o // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], 1)


def ghostnet() -> Case:
    """Cheap copies joined with what they are of."""
    blocks = [Residual(nn.Sequential(_Ghost(24, 48), _Ghost(48, 24))), conv_norm(24, 40, 3, 2)]
    blocks += [Residual(nn.Sequential(_Ghost(40, 80), _Ghost(80, 40))) for _ in range(2)]
    return Case(nn.Sequential(conv_norm(3, 24, 3, 2), *blocks, head(40)), images())


class _Fire(nn.Module):
    """Source: Iandola et al. 2016, "SqueezeNet"."""

    def __init__(self, i: int, squeezed: int, o: int) -> None:
        super().__init__()
        self.squeeze, self.one = nn.Conv2d(i, squeezed, 1), nn.Conv2d(squeezed, o // 2, 1)
        self.three = nn.Conv2d(squeezed, o // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


def squeezenet() -> Case:
    """No norms; a convolution classifies."""
    stem = [nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]
    fires = [_Fire(32, 16, 64), _Fire(64, 16, 64), nn.MaxPool2d(3, 2, ceil_mode=True), _Fire(64, 32, 128)]
    last = [nn.Dropout(), nn.Conv2d(128, 50, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Case(nn.Sequential(*stem, *fires, *last), images())


class _Inception(nn.Module):
    """Source: Szegedy et al. 2016, "Rethinking the Inception Architecture"."""

    def __init__(self, i: int, width: int) -> None:
        super().__init__()
        self.one = conv_norm(i, width, 1)
        self.three = nn.Sequential(conv_norm(i, width, 1), conv_norm(width, width, 3))
        self.five = nn.Sequential(conv_norm(i, width, 1), conv_norm(width, width, 3), conv_norm(width, width, 3))
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_norm(i, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


def inception() -> Case:
    """Branches behind an average pool that pads."""
    blocks = [_Inception(32, 16), nn.MaxPool2d(3, 2), _Inception(64, 24), _Inception(96, 24)]
    return Case(nn.Sequential(conv_norm(3, 32, 3, 2), *blocks, head(96)), images())


class _RepVgg(nn.Module):
    """Three branches, not merged. Source: Ding et al. 2021, "RepVGG"."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.three, self.one = conv_norm(channels, channels, 3, act=None), conv_norm(channels, channels, 1, act=None)
        self.identity = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.three(x) + self.one(x) + self.identity(x))


def repvgg() -> Case:
    """Norms beside convolutions."""
    stages = [conv_norm(3, 32, 3, 2), _RepVgg(32), _RepVgg(32), conv_norm(32, 64, 3, 2), _RepVgg(64), _RepVgg(64)]
    return Case(nn.Sequential(*stages, head(64)), images())


class _LinearNorm(nn.Sequential):
    """Linear layer and BatchNorm over the last dimension."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(nn.Linear(i, o, bias=False), nn.BatchNorm1d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x)
        return self[1](y.flatten(0, 1)).reshape_as(y)


class _LevitBlock(nn.Module):
    """Source: Graham et al. 2021, "LeViT"."""

    def __init__(self, dim: int, heads: int = 4, key: int = 16, places: int = 64) -> None:
        super().__init__()
        self.heads, self.key, self.value = heads, key, 2 * key
        self.qkv, self.proj = _LinearNorm(dim, heads * 4 * key), _LinearNorm(heads * 2 * key, dim)
        self.mlp = nn.Sequential(_LinearNorm(dim, 2 * dim), nn.Hardswish(), _LinearNorm(2 * dim, dim))
        self.bias = nn.Parameter(0.02 * torch.randn(heads, places, places))

    def forward(self, x: Tensor) -> Tensor:
        n, places, _ = x.shape
        parts = self.qkv(x).view(n, places, self.heads, -1).split([self.key, self.key, self.value], 3)
        q, k, v = (part.transpose(1, 2) for part in parts)
        attention = (q @ k.transpose(-2, -1) * self.key**-0.5 + self.bias).softmax(-1)
        x = x + self.proj(F.hardswish((attention @ v).transpose(1, 2).reshape(n, places, -1)))
        return x + self.mlp(x)


class _Levit(nn.Module):
    def __init__(self, dim: int = 96) -> None:
        super().__init__()
        convs = [conv_norm(i, o, 3, 2, act=nn.Hardswish) for i, o in ((3, 24), (24, 48), (48, dim))]
        self.stem, self.blocks = nn.Sequential(*convs), nn.Sequential(*(_LevitBlock(dim) for _ in range(3)))
        self.norm, self.head = nn.BatchNorm1d(dim), nn.Linear(dim, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x).flatten(2).transpose(1, 2)).mean(1)))


def levit() -> Case:
    """Attention with BatchNorm behind linear layers."""
    return Case(_Levit(), images())


class _VisionTransformer(nn.Module):
    """Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"."""

    def __init__(self, dim: int = 96) -> None:
        super().__init__()
        self.embed, self.first = nn.Conv2d(3, dim, 8, 8), nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 65, dim))
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, 50)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


def vision_transformer() -> Case:
    """PyTorch's own encoder over patches."""
    return Case(_VisionTransformer(), images())
