"""Networks that answer for every place: detection, segmentation, restoration and generation of images."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from network_cases import Case, images
from networks_images import conv_norm
from torch import Tensor, nn


class _Split(nn.Module):
    """Halves, of which one goes on through bottlenecks and all are joined. Source: Ultralytics' YOLOv8, module C2f."""

    def __init__(self, i: int, o: int, repeats: int) -> None:
        super().__init__()
        half = o // 2
        self.first, self.last = conv_norm(i, o, 1, act=nn.SiLU), conv_norm((2 + repeats) * half, o, 1, act=nn.SiLU)
        pair = lambda: nn.Sequential(conv_norm(half, half, act=nn.SiLU), conv_norm(half, half, act=nn.SiLU))  # noqa: E731
        self.inner = nn.ModuleList(pair() for _ in range(repeats))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for inner in self.inner:
            parts.append(parts[-1] + inner(parts[-1]))
        return self.last(torch.cat(parts, 1))


class _Yolo(nn.Module):
    """Boxes as distributions and scores of two scales in one tensor, as YOLOv8 answers."""

    def __init__(self, classes: int = 10, bins: int = 8) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.one = nn.Sequential(
            conv_norm(3, 16, 3, 2, act=nn.SiLU), conv_norm(16, 32, 3, 2, act=nn.SiLU), _Split(32, 32, 1)
        )
        self.two = nn.Sequential(conv_norm(32, 64, 3, 2, act=nn.SiLU), _Split(64, 64, 1))
        self.up, self.merge = nn.Upsample(scale_factor=2), _Split(96, 32, 1)
        self.boxes = nn.ModuleList(nn.Conv2d(i, 4 * bins, 1) for i in (32, 64))
        self.scores = nn.ModuleList(nn.Conv2d(i, classes, 1) for i in (32, 64))
        self.register_buffer("project", torch.arange(bins, dtype=torch.float32).view(1, 1, bins, 1))

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(one)
        scales = [self.merge(torch.cat([one, self.up(two)], 1)), two]
        found = []
        for scale, boxes, scores in zip(scales, self.boxes, self.scores, strict=True):
            n, _, h, w = scale.shape
            box = boxes(scale).view(n, 4, self.bins, h * w).softmax(2)
            found.append(torch.cat([(box * self.project).sum(2), scores(scale).sigmoid().flatten(2)], 1))
        return torch.cat(found, 2)


def yolo() -> Case:
    """Chunks, upsampling, boxes beside scores."""
    return Case(_Yolo(), images(size=96))


class _Pyramid(nn.Module):
    """Three scales and shared heads. Source: Lin et al. 2017, "Focal Loss for Dense Object Detection"."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv_norm(3, 32, 3, 2), conv_norm(32, 64, 3, 2), conv_norm(64, 96, 3, 2)])
        self.laterals = nn.ModuleList(nn.Conv2d(i, 48, 1) for i in (32, 64, 96))
        self.smooth = nn.ModuleList(nn.Conv2d(48, 48, 3, padding=1) for _ in range(3))
        self.classify = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 10, 3, padding=1))
        self.locate = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 4, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        merged = self.laterals[2](found[2])
        scales = [merged]
        for index in (1, 0):
            merged = self.laterals[index](found[index]) + F.interpolate(merged, size=found[index].shape[-2:])
            scales.append(merged)
        scales = [smooth(scale) for smooth, scale in zip(self.smooth, scales, strict=True)]
        return [self.classify(scale) for scale in scales], [self.locate(scale) for scale in scales]


def pyramid() -> Case:
    """Interpolation to the size of another tensor, several results."""
    return Case(_Pyramid(), images())


class _Frozen(nn.Module):
    """A BatchNorm of four buffers, written out, as detection libraries have."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", 0.5 + torch.rand(channels))
        self.register_buffer("bias", 0.1 * torch.randn(channels))
        self.register_buffer("running_mean", 0.1 * torch.randn(channels))
        self.register_buffer("running_var", 0.5 + torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        variance, mean = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class _Detr(nn.Module):
    """Queries attend to the features of a frozen backbone. Source: Carion et al. 2020, "DETR"."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        layers = [
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), _Frozen(o), nn.ReLU())
            for i, o in ((3, 32), (32, 64), (64, 96))
        ]
        self.backbone, self.project = nn.Sequential(*layers), nn.Conv2d(96, dim, 1)
        self.transformer = nn.Transformer(dim, 4, 2, 2, 4 * dim, 0.0, batch_first=True)
        self.queries, self.positions = nn.Parameter(torch.randn(10, dim)), nn.Parameter(torch.randn(1, 64, dim))
        self.classify, self.boxes = nn.Linear(dim, 11), nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.project(self.backbone(x)).flatten(2).transpose(1, 2) + self.positions
        found = self.transformer(memory, self.queries.expand(len(x), -1, -1))
        return self.classify(found), self.boxes(found).sigmoid()


def detr() -> Case:
    """Frozen norms written out, `nn.Transformer`."""
    return Case(_Detr(), images(), one_size=True)


class _Unet(nn.Module):
    """Source: Ronneberger et al. 2015, "U-Net"."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.one, self.two, self.three = conv_norm(3, 24), conv_norm(24, 48), conv_norm(48, 96)
        up = [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False) for _ in range(2)]
        wide, narrow = (nn.ConvTranspose2d(96, 48, 2, 2), nn.ConvTranspose2d(48, 24, 2, 2)) if transposed else up
        self.up_two, self.up_one = wide, narrow
        self.join_two = conv_norm(48 + (48 if transposed else 96), 48)
        self.join_one = conv_norm(24 + (24 if transposed else 48), 24)
        self.head = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        three = self.three(F.max_pool2d(two, 2))
        two = self.join_two(torch.cat([two, self.up_two(three)], 1))
        return self.head(self.join_one(torch.cat([one, self.up_one(two)], 1)))


def unet() -> Case:
    """Transposed convolutions."""
    return Case(_Unet(transposed=True), images())


def unet_bilinear() -> Case:
    """Bilinear upsampling."""
    return Case(_Unet(transposed=False), images())


class _DeepLab(nn.Module):
    """Dilated branches and the mean of all places. Source: Chen et al. 2017, "Rethinking Atrous Convolution"."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 32, 3, 2), conv_norm(32, 64, 3, 2))
        dilated = [
            nn.Sequential(nn.Conv2d(64, 32, 3, padding=d, dilation=d), nn.BatchNorm2d(32), nn.ReLU()) for d in (2, 4)
        ]
        self.branches = nn.ModuleList([conv_norm(64, 32, 1), *dilated])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_norm(64, 32, 1))
        self.join, self.head = conv_norm(128, 48, 1), nn.Conv2d(48, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        parts = [branch(y) for branch in self.branches]
        parts.append(F.interpolate(self.pool(y), size=y.shape[-2:], mode="bilinear", align_corners=False))
        y = self.head(self.join(torch.cat(parts, 1)))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


def deeplab() -> Case:
    """Interpolation to sizes of other tensors."""
    return Case(_DeepLab(), images())


def super_resolution() -> Case:
    """Reflected borders and PixelShuffle. Source: Lim et al. 2017, "Enhanced Deep Residual Networks"."""
    conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1, padding_mode="reflect")  # noqa: E731
    body = [layer for _ in range(4) for layer in (conv(32, 32), nn.ReLU())]
    return Case(nn.Sequential(conv(3, 32), nn.PReLU(), *body, conv(32, 48), nn.PixelShuffle(4)), images(size=32))


def style_transfer() -> Case:
    """InstanceNorm and upsampling. Source: Johnson et al. 2016, "Perceptual Losses for Real-Time Style Transfer"."""

    def block(i: int, o: int, stride: int = 1) -> nn.Module:
        conv = nn.Conv2d(i, o, 3, stride)
        return nn.Sequential(nn.ReflectionPad2d(1), conv, nn.InstanceNorm2d(o, affine=True), nn.ReLU())

    up = nn.Upsample(scale_factor=2)
    layers = [block(3, 24), block(24, 48, 2), block(48, 48), block(48, 48), up, block(48, 24), nn.Conv2d(24, 3, 3)]
    return Case(nn.Sequential(*layers, nn.Tanh()), images())


class _Vae(nn.Module):
    """The mean of the code is decoded in evaluation. Source: Kingma and Welling 2014."""

    def __init__(self) -> None:
        super().__init__()
        encoder = [conv_norm(3, 32, 3, 2), conv_norm(32, 64, 3, 2), nn.Flatten(), nn.Linear(64 * 64, 64)]
        decoder = [nn.Linear(32, 64 * 64), nn.Unflatten(1, (64, 8, 8)), nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU()]
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder, nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, spread = self.encoder(x).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (spread / 2).exp() if self.training else mean
        return self.decoder(code), mean, spread


def vae() -> Case:
    """Chunks of a linear layer, transposed convolutions, several results."""
    return Case(_Vae(), images(size=32))


def gan() -> Case:
    """Transposed convolutions from a code. Source: Radford et al. 2016, "Unsupervised Representation Learning"."""
    layers = [nn.Unflatten(1, (48, 1, 1)), nn.ConvTranspose2d(48, 96, 4), nn.BatchNorm2d(96), nn.ReLU()]
    for i, o in ((96, 48), (48, 24)):
        layers += [nn.ConvTranspose2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    codes = lambda number, seed: torch.randn(number, 48, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    return Case(nn.Sequential(*layers, nn.ConvTranspose2d(24, 3, 4, 2, 1), nn.Tanh()), codes)


class _Modulated(nn.Module):
    """Every sample has weights of its own. Source: Karras et al. 2020, "Analyzing and Improving StyleGAN"."""

    def __init__(self, i: int, o: int, style: int) -> None:
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(1, o, i, 3, 3) / math.sqrt(9 * i)), nn.Linear(style, i)
        self.noise = nn.Parameter(torch.zeros(1, o, 1, 1))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        n, i, h, w = x.shape
        weight = self.weight * (1 + self.style(style).view(n, 1, i, 1, 1))
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        y = F.conv2d(x.reshape(1, n * i, h, w), weight.flatten(0, 1), padding=1, groups=n)
        return F.leaky_relu(y.view(n, -1, h, w) + self.noise, 0.2)


class _StyleGan(nn.Module):
    def __init__(self, style: int = 64) -> None:
        super().__init__()
        self.mapping = nn.Sequential(
            *(layer for _ in range(3) for layer in (nn.Linear(style, style), nn.LeakyReLU(0.2)))
        )
        self.start = nn.Parameter(torch.randn(1, 48, 8, 8))
        self.blocks = nn.ModuleList([_Modulated(48, 48, style), _Modulated(48, 32, style)])
        self.smooth, self.to_image = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 3, 1)

    def forward(self, code: Tensor) -> Tensor:
        style, x = self.mapping(code), self.start.expand(len(code), -1, -1, -1)
        for block in self.blocks:
            x = F.interpolate(block(x, style), scale_factor=2, mode="nearest")
        return self.to_image(F.leaky_relu(self.smooth(x), 0.2))


def stylegan() -> Case:
    """Convolutions whose weights are modulated by a style."""
    codes = lambda number, seed: torch.randn(number, 64, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    return Case(_StyleGan(), codes, one_size=True)


class _TimedBlock(nn.Module):
    """Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models"."""

    def __init__(self, i: int, o: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, i), nn.Conv2d(i, o, 3, padding=1)
        self.norm2, self.conv2, self.time = nn.GroupNorm(8, o), nn.Conv2d(o, o, 3, padding=1), nn.Linear(time, o)
        self.shortcut = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class _Diffusion(nn.Module):
    def __init__(self, time: int = 64) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 64, 3, 2, 1)
        self.time = nn.Sequential(nn.Linear(32, time), nn.SiLU(), nn.Linear(time, time))
        self.blocks = nn.ModuleList([_TimedBlock(32, 32, time), _TimedBlock(64, 64, time), _TimedBlock(96, 32, time)])
        self.norm, self.qkv, self.proj = nn.GroupNorm(8, 64), nn.Conv2d(64, 192, 1), nn.Conv2d(64, 64, 1)
        self.last = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 4, 3, padding=1))
        self.register_buffer("pitch", torch.exp(-math.log(1000) * torch.arange(16) / 16))

    def attend(self, x: Tensor) -> Tensor:
        """Let all places attend to each other: `(N, C, H, W)`."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, 2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.proj(y)

    def forward(self, x: Tensor) -> Tensor:
        angle = 100 * x.mean((1, 2, 3))[:, None] * self.pitch
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        wide = self.blocks[0](self.first(x), time)
        deep = self.attend(self.blocks[1](self.down(wide), time))
        y = torch.cat([wide, F.interpolate(deep, scale_factor=2.0, mode="nearest")], 1)
        return self.last(self.blocks[2](y, time))


def diffusion_unet() -> Case:
    """GroupNorm, SiLU, attention over places, a time for each sample."""
    return Case(_Diffusion(), images(channels=4, size=32))
