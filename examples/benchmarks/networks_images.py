"""Networks that classify images or clips, small ones in the shape of those that people train.

Each function returns a `Case`; sources stand with the parts that are theirs.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from network_cases import Case, clips, images
from reference_models import mobilenet_v2, resnet18
from torch import Tensor, nn


def conv_norm(
    i: int, o: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type | None = nn.ReLU
) -> nn.Module:
    """Convolve with same padding, normalize, activate."""
    layers = [nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([act()] if act else []))


def head(channels: int, classes: int = 50) -> nn.Module:
    """Average over all places and classify."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Squeeze(nn.Module):
    """Scale channels by what all places say of them. Source: Hu et al. 2018, "Squeeze-and-Excitation Networks"."""

    def __init__(self, channels: int, gate: type = nn.Sigmoid, act: type = nn.ReLU) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)
        self.act, self.gate = act(), gate()

    def forward(self, x: Tensor) -> Tensor:
        """Scale `(N, C, H, W)`."""
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class Residual(nn.Module):
    """Add a branch, and activate where that is asked for."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut, self.act = branch, shortcut or nn.Identity(), act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add branch and shortcut."""
        return self.act(self.shortcut(x) + self.branch(x))


class _NormAct(nn.BatchNorm2d):
    """BatchNorm and activation in one layer, as timm's models have them."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var)
        return self.act(F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps))


class _SameConv(nn.Conv2d):
    """Pads as TensorFlow does, by an amount computed from the input's size."""

    def forward(self, x: Tensor) -> Tensor:
        amounts = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            amounts += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, amounts), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _inverted(i: int, o: int, kernel: int, stride: int, act: type, gate: type | None, same: bool = False) -> nn.Module:
    """Expand, filter each channel alone, scale, project. Source: Tan and Le 2019, "EfficientNet"."""
    hidden = 4 * i
    conv = _SameConv if same else nn.Conv2d
    depthwise = conv(hidden, hidden, kernel, stride, 0 if same else kernel // 2, groups=hidden, bias=False)
    layers = [nn.Conv2d(i, hidden, 1, bias=False), _NormAct(hidden, act()), depthwise, _NormAct(hidden, act())]
    layers += [Squeeze(hidden, gate, act)] if gate else []
    layers += [nn.Conv2d(hidden, o, 1, bias=False), nn.BatchNorm2d(o)]
    branch = nn.Sequential(*layers)
    return Residual(branch) if stride == 1 and i == o else branch


def efficientnet() -> Case:
    """SiLU, squeeze-and-excitation, padding computed from sizes, BatchNorm with activation."""
    stages = [_inverted(16, 24, 3, 2, nn.SiLU, nn.Sigmoid, True), _inverted(24, 24, 3, 1, nn.SiLU, nn.Sigmoid, True)]
    stages += [_inverted(24, 40, 5, 2, nn.SiLU, nn.Sigmoid, True), _inverted(40, 40, 5, 1, nn.SiLU, nn.Sigmoid, True)]
    return Case(nn.Sequential(conv_norm(3, 16, 3, 2, act=nn.SiLU), *stages, head(40)), images())


def mobilenet_v3() -> Case:
    """Hardswish and Hardsigmoid. Source: Howard et al. 2019, "Searching for MobileNetV3"."""
    stages = [_inverted(16, 24, 3, 2, nn.ReLU, None), _inverted(24, 24, 3, 1, nn.ReLU, None)]
    stages += [
        _inverted(24, 40, 5, 2, nn.Hardswish, nn.Hardsigmoid),
        _inverted(40, 40, 5, 1, nn.Hardswish, nn.Hardsigmoid),
    ]
    top = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 128), nn.Hardswish(), nn.Linear(128, 50))
    return Case(nn.Sequential(conv_norm(3, 16, 3, 2, act=nn.Hardswish), *stages, top), images())


def _bottleneck(i: int, o: int, stride: int, groups: int, squeeze: bool = False) -> nn.Module:
    scale = [Squeeze(o)] if squeeze else []
    branch = nn.Sequential(conv_norm(i, o, 1), conv_norm(o, o, 3, stride, groups), *scale, conv_norm(o, o, 1, act=None))
    return Residual(branch, conv_norm(i, o, 1, stride, act=None) if stride > 1 or i != o else None, nn.ReLU())


def resnext() -> Case:
    """Grouped bottlenecks. Source: Xie et al. 2017, "Aggregated Residual Transformations"."""
    blocks = [
        _bottleneck(32, 64, 1, 8),
        _bottleneck(64, 64, 1, 8),
        _bottleneck(64, 128, 2, 8),
        _bottleneck(128, 128, 1, 8),
    ]
    return Case(nn.Sequential(conv_norm(3, 32, 3, 2), *blocks, head(128)), images())


def regnet() -> Case:
    """Grouped bottlenecks with squeeze-and-excitation. Source: Radosavovic et al. 2020, "Network Design Spaces"."""
    blocks = [_bottleneck(32, 48, 2, 3, True), _bottleneck(48, 96, 2, 6, True), _bottleneck(96, 96, 1, 6, True)]
    return Case(nn.Sequential(conv_norm(3, 32, 3, 2), *blocks, head(96)), images())


class _Dense(nn.Module):
    """Append what a layer makes. Source: Huang et al. 2017, "Densely Connected Convolutional Networks"."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


def densenet() -> Case:
    """Dense blocks, norms before their convolutions."""
    first = [_Dense(32 + 16 * k, 16) for k in range(4)]
    between = nn.Sequential(nn.BatchNorm2d(96), nn.ReLU(), nn.Conv2d(96, 48, 1, bias=False), nn.AvgPool2d(2))
    second = [_Dense(48 + 16 * k, 16) for k in range(4)]
    net = [conv_norm(3, 32, 3, 2), *first, between, *second, nn.BatchNorm2d(112), nn.ReLU(), head(112)]
    return Case(nn.Sequential(*net), images())


class _ConvNext(nn.Module):
    """Source: Liu et al. 2022, "A ConvNet for the 2020s"."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(dim, dim, 7, padding=3, groups=dim), nn.LayerNorm(dim, eps=1e-6)
        self.up, self.act, self.down = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(0.3 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(self.act(self.up(y)))).permute(0, 3, 1, 2)


def convnext() -> Case:
    """LayerNorm over channels, GELU, layer scale."""
    blocks = [_ConvNext(48), _ConvNext(48), nn.Conv2d(48, 96, 2, 2), _ConvNext(96), _ConvNext(96)]
    return Case(nn.Sequential(nn.Conv2d(3, 48, 4, 4), *blocks, head(96)), images())


class _WindowBlock(nn.Module):
    """Attention in shifted windows. Source: Liu et al. 2021, "Swin Transformer"."""

    def __init__(self, dim: int, size: int, window: int, shift: int, heads: int = 4) -> None:
        super().__init__()
        self.size, self.window, self.shift, self.heads = size, window, shift, heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.bias = nn.Parameter(0.02 * torch.randn(heads, window**2, window**2))

    def attend(self, x: Tensor) -> Tensor:
        """Attend among `(N, size, size, dim)`."""
        n, s, w, dim = x.shape[0], self.size, self.window, x.shape[-1]
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        x = x.view(n, s // w, w, s // w, w, dim).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, dim)
        q, k, v = self.qkv(x).view(-1, w * w, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-2, -1) / math.sqrt(dim // self.heads) + self.bias).softmax(-1)
        x = self.proj((attention @ v).transpose(1, 2).reshape(-1, w * w, dim))
        x = x.view(n, s // w, s // w, w, w, dim).permute(0, 1, 3, 2, 4, 5).reshape(n, s, s, dim)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 48, 4, 4)
        self.blocks = nn.Sequential(*(_WindowBlock(48, 16, 4, 2 * (k % 2)) for k in range(4)))
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x).permute(0, 2, 3, 1))).mean((1, 2)))


def swin() -> Case:
    """Window attention with rolls and a position bias."""
    return Case(_Swin(), images())


class _Mixer(nn.Module):
    """Source: Tolstikhin et al. 2021, "MLP-Mixer"."""

    def __init__(self, places: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.places = nn.Sequential(nn.Linear(places, 128), nn.GELU(), nn.Linear(128, places))
        self.channels = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


def mlp_mixer() -> Case:
    """Linear layers over places and over channels in turn."""
    embed = nn.Sequential(nn.Conv2d(3, 96, 8, 8), nn.Flatten(2), _Swap())
    return Case(nn.Sequential(embed, *(_Mixer(64, 96) for _ in range(4)), nn.LayerNorm(96), _Pool()), images())


class _Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class _Pool(nn.Module):
    def __init__(self, dim: int = 96) -> None:
        super().__init__()
        self.head = nn.Linear(dim, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(1))


class StandardizedConv(nn.Conv2d):
    """Its weights are standardized in forward. Source: Qiao et al. 2019, "Weight Standardization"."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `(N, C, H, W)`."""
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-10) / math.sqrt(self.weight[0].numel() / 2)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _standardized(i: int, o: int, stride: int, norm: bool) -> nn.Module:
    def before(channels: int) -> list[nn.Module]:
        return [nn.GroupNorm(8, channels), nn.ReLU()] if norm else [nn.GELU()]

    convs = [StandardizedConv(i, o, 3, stride, 1, bias=not norm), StandardizedConv(o, o, 3, 1, 1, bias=not norm)]
    branch = nn.Sequential(*before(i), convs[0], *before(o), convs[1])
    return Residual(branch, StandardizedConv(i, o, 1, stride, bias=False) if i != o else None)


def bit_resnet() -> Case:
    """Weight standardization and GroupNorm. Source: Kolesnikov et al. 2020, "Big Transfer"."""
    blocks = [_standardized(32, 64, 2, True), _standardized(64, 64, 1, True), _standardized(64, 96, 2, True)]
    net = [StandardizedConv(3, 32, 3, 2, 1, bias=False), *blocks, nn.GroupNorm(8, 96), nn.ReLU(), head(96)]
    return Case(nn.Sequential(*net), images())


def nfnet() -> Case:
    """No norms but of weights, GELU. Source: Brock et al. 2021, "High-Performance Large-Scale Image Recognition"."""
    blocks = [_standardized(32, 64, 2, False), _standardized(64, 64, 1, False), _standardized(64, 96, 2, False)]
    return Case(nn.Sequential(StandardizedConv(3, 32, 3, 2, 1), *blocks, nn.GELU(), head(96)), images())


def resnet() -> Case:
    """ResNet18."""
    return Case(resnet18(100), images())


def mobilenet() -> Case:
    """MobileNetV2."""
    return Case(mobilenet_v2(100), images())


def video_resnet() -> Case:
    """Convolutions over space and time. Source: Tran et al. 2018, "A Closer Look at Spatiotemporal Convolutions"."""

    def conv(i: int, o: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(nn.Conv3d(i, o, 3, stride, 1, bias=False), nn.BatchNorm3d(o), nn.ReLU())

    blocks = [conv(3, 16), Residual(conv(16, 16)), conv(16, 32, 2), Residual(conv(32, 32))]
    return Case(nn.Sequential(*blocks, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 20)), clips())
