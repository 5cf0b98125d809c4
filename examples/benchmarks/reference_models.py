"""Float models for the benchmarks, written as users write them: nothing in them knows of quantization."""

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; one in-place ReLU instance serves both places."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def residual(self, features: Tensor) -> Tensor:
        """Compute the branch beside the shortcut: `(N, in_channels, H, W)` to `(N, out_channels, H', W')`."""
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(features)))))

    def forward(self, features: Tensor) -> Tensor:
        """Add branch and shortcut: `(N, in_channels, H, W)` to `(N, out_channels, H', W')`."""
        residual = self.residual(features)
        residual += self.shortcut(features)
        return self.relu(residual)


class ResNet18(nn.Module):
    """ResNet with 18 weighted layers: images `(N, in_channels, H, W)` to logits `(N, num_classes)`.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", table 1, with projection shortcuts.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = nn.Sequential(
            nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64)),
            nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128)),
            nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256)),
            nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images `(N, in_channels, H, W)`: logits `(N, num_classes)`."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.fc(torch.flatten(self.avgpool(self.stages(features)), 1))


def resnet18(num_classes: int = 1000, in_channels: int = 3) -> ResNet18:
    """Build a ResNet18 with random weights, 11.7 M parameters at 1,000 classes."""
    return ResNet18(num_classes, in_channels)


def small_resnet18(num_classes: int = 10, in_channels: int = 1, width: int = 16) -> nn.Sequential:
    """Build ResNet18's blocks with a stem for small images, `(N, in_channels, 32, 32)`, and few channels.

    Source: He et al. 2016, section 4.2, for the stem: one 3x3 convolution, and no pooling behind it.
    """
    layers = [*_conv_bn(in_channels, width, 3), nn.ReLU(inplace=True)]
    channels = width
    for stage in range(4):
        out_channels = width * 2**stage
        layers += [BasicBlock(channels, out_channels, 1 if stage == 0 else 2), BasicBlock(out_channels, out_channels)]
        channels = out_channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def _conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolve with same padding and normalize."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel alone, project without activation; shortcut where the shapes allow it."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [*_conv_bn(in_channels, hidden, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
        depthwise = [*_conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(inplace=True)]
        self.branch = nn.Sequential(*expand, *depthwise, *_conv_bn(hidden, out_channels, 1))
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, features: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, H', W')`."""
        return features + self.branch(features) if self.has_shortcut else self.branch(features)


def mobilenet_v2(num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.2) -> nn.Sequential:
    """Build a MobileNetV2 with random weights, 3.5 M parameters at 1,000 classes.

    Images `(N, in_channels, H, W)` to logits `(N, num_classes)`.

    Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 2.
    """
    layers: list[nn.Module] = [*_conv_bn(in_channels, 32, 3, stride=2), nn.ReLU6(inplace=True)]
    channels = 32
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, width, repeats, stride in stages:
        for index in range(repeats):
            layers.append(InvertedBottleneck(channels, width, stride if index == 0 else 1, expansion))
            channels = width
    layers += [*_conv_bn(channels, 1280, 1), nn.ReLU6(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(1280, num_classes))


def fashion_cnn(num_classes: int = 10) -> nn.Sequential:
    """Build a CNN with one residual block for images `(N, 1, 28, 28)`: logits `(N, num_classes)`."""
    return nn.Sequential(
        *_conv_bn(1, 24, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        *_conv_bn(24, 64, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        BasicBlock(64, 64),
        *_conv_bn(64, 96, 3),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, num_classes),
    )


def drop_path(branch: Tensor, drop_probability: float, training: bool) -> Tensor:
    """Zero the branch for random samples of the batch while training, and scale up those that remain.

    Args:
        branch: `(N, ...)`, a residual branch.
        drop_probability: in `[0, 1)`.
        training: without it the branch is returned as it is.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth".
    """
    if drop_probability == 0.0 or not training:
        return branch
    kept = torch.rand(branch.shape[0], *[1] * (branch.dim() - 1), device=branch.device) >= drop_probability
    return branch * kept / (1 - drop_probability)


class StochasticDepthBlock(BasicBlock):
    """Residual block whose forward differs in training: each sample may skip the branch."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, drop_probability: float = 0.1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.drop_probability = drop_probability

    def forward(self, features: Tensor) -> Tensor:
        """Add shortcut and branch: `(N, in_channels, H, W)` to `(N, out_channels, H', W')`."""
        residual = self.residual(features)
        if self.training:
            residual = drop_path(residual, self.drop_probability, self.training)
        return self.relu(self.shortcut(features) + residual)


def timm_style_net(num_classes: int = 10, in_channels: int = 1, drop_probability: float = 0.1) -> nn.Sequential:
    """Build a residual net with stochastic depth: images `(N, in_channels, H, W)` to logits `(N, num_classes)`."""
    return nn.Sequential(
        *_conv_bn(in_channels, 32, 3, stride=2),
        nn.ReLU(inplace=True),
        StochasticDepthBlock(32, 64, 2, drop_probability),
        StochasticDepthBlock(64, 64, 1, drop_probability),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )
