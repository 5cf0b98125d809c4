"""Small float nets, written as users write them, and one call of each; several test files share them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate
from lightning_quant.export.prepare import prepare
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.simulate.prepared import Prepared


class ResidualNet(nn.Module):
    """A residual block behind a stem; every activation is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        features = self.stem(image)
        branch = self.relu1(self.bn1(self.conv1(features)))
        features = self.relu2(features + self.bn2(self.conv2(branch)))
        return self.fc(torch.flatten(self.pool(features), 1))


class DepthwiseNet(nn.Module):
    """Inverted bottleneck with ReLU6: pointwise, depthwise, pointwise without activation, shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(12), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(12, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4, 3))

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features + self.project(self.depthwise(self.expand(features))))


class MLP(nn.Module):
    """Linear, BatchNorm1d and ReLU twice, then a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(inplace=True),
            nn.Linear(16, 16, bias=False),
            nn.BatchNorm1d(16),
            nn.ReLU(inplace=True),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class DropPathNet(nn.Module):
    """A residual block that drops its branch for random samples while training."""

    def __init__(self, drop_probability: float = 0.5) -> None:
        super().__init__()
        self.drop_probability = drop_probability
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        features = self.relu(self.bn1(self.conv1(image)))
        branch = self.bn2(self.conv2(features))
        if self.training:
            keep = 1 - self.drop_probability
            branch = branch * (torch.rand(branch.shape[0], 1, 1, 1) < keep) / keep
        return self.fc(self.relu(features + branch).mean((2, 3)))


class PaddingConv2d(nn.Conv2d):
    """A convolution whose forward only pads before it convolves."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class PaddedNet(nn.Module):
    """A convolution that pads by itself on the right and below, then another after a padding layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = PaddingConv2d(3, 6, 3, stride=2)
        self.relu = nn.ReLU()
        self.pad = nn.ZeroPad2d(1)
        self.conv2 = nn.Conv2d(6, 6, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.relu(self.conv2(self.pad(self.relu(self.conv1(image)))))


class FunctionalNet(nn.Module):
    """Every spelling of a clipping activation that is no module, in-place ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(7))
        self.register_parameter("kernel", nn.Parameter(torch.randn(4, 4, 1, 1) / 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.convs[0](x))
        x = torch.relu(self.convs[1](x))
        x = self.convs[2](x).relu()
        x = torch.clamp(self.convs[3](x), 0, 4)
        x = F.hardtanh(self.convs[4](x), -1.0, 2.0)
        x = F.relu6(self.convs[5](x), inplace=True)
        x = F.relu(self.convs[6](x), inplace=True)
        return F.conv2d(x, self.kernel).clamp(min=0)


class SharedActivationNet(nn.Module):
    """One in-place ReLU instance behind a convolution, another one, an addition and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.hidden = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, image: Tensor) -> Tensor:
        features = self.relu(self.conv1(image))
        branch = self.relu(self.conv2(features))
        branch += features
        return self.fc(self.relu(self.hidden(self.relu(branch).mean((2, 3)))))


@dataclass
class Prediction:
    """What a multi-modal net returns: a tensor field and a dict of further ones."""

    logits: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)


class MultiModalNet(nn.Module):
    """Keyword-only arguments: an image, token ids, a mask of the valid tokens, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.fuse = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, *, image: Tensor, tokens: Tensor, mask: Tensor, scaled: bool = False) -> Prediction:
        words = self.embedding(tokens).masked_fill(~mask.unsqueeze(-1), 0.0).sum(1)
        features = F.relu(self.bn(self.conv(image))).mean((2, 3))
        fused = F.relu(self.fuse(features) + words)
        logits = self.head(fused)
        if scaled:
            logits = logits / 2
        return Prediction(logits, {"fused": fused, "valid": mask.sum(1)})


class DictNet(nn.Module):
    """Nested inputs by position and by keyword, a dict with a tuple as result."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(5, 8)
        self.right = nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, batch: dict[str, Tensor], *, offset: Tensor) -> dict[str, Any]:
        left, right = F.relu(self.left(batch["a"])), F.relu(self.right(batch["b"]))
        joint = left + right
        return {"scores": self.head(joint) + offset, "sides": (left, right)}


class BranchingNet(nn.Module):
    """Its own forward asks for a tensor's value, so only its children can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(6, 4)

    def forward(self, image: Tensor) -> Tensor:
        features = self.backbone(image).mean((2, 3))
        if features.abs().max() > 1e6:
            features = features / 1e6
        return self.head(features)


class ViewsNet(nn.Module):
    """Encodes each view of `(batch, views, 3, height, width)` with one encoder: a loop over a size."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(6, 4)

    def forward(self, views: Tensor) -> Tensor:
        encoded = [self.encoder(views[:, index]) for index in range(views.shape[1])]
        return self.head(torch.stack(encoded).amax(0))


class NormAfterActivationNet(nn.Module):
    """A BatchNorm behind an activation and one before any convolution: neither can be folded backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU()
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.bn_input = nn.BatchNorm2d(3)

    def forward(self, image: Tensor) -> Tensor:
        features = self.bn1(self.relu(self.conv1(self.bn_input(image))))
        return self.bn2(self.relu(self.conv2(features)))


class SqueezeExciteNet(nn.Module):
    """A convolution whose channels are scaled by a gate computed from their means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.reduce = nn.Conv2d(8, 4, 1)
        self.expand = nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        features = F.relu(self.bn(self.conv(image)))
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(features, 1)))))
        return self.project(features * gate)


class PoolingNet(nn.Module):
    """Max-pool, average pool, concatenation and a flatten before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 4, 5, padding=2)
        self.max_pool = nn.MaxPool2d(2)
        self.avg_pool = nn.AvgPool2d(2)
        self.conv3 = nn.Conv2d(8, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 2 * 2, 3)

    def forward(self, image: Tensor) -> Tensor:
        both = torch.cat([F.relu(self.conv1(image)), F.relu(self.conv2(image))], 1)
        features = F.relu(self.conv3(self.max_pool(both)))
        return self.fc(self.avg_pool(features).flatten(1))


class Conv1dNet(nn.Module):
    """Two one-dimensional convolutions, the second one strided, and a global average."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 6, 5, padding=2, bias=False)
        self.bn1 = nn.BatchNorm1d(6)
        self.conv2 = nn.Conv1d(6, 6, 3, stride=2)
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.fc = nn.Linear(6, 3)

    def forward(self, signal: Tensor) -> Tensor:
        features = F.relu(self.conv2(F.relu(self.bn1(self.conv1(signal)))))
        return self.fc(self.pool(features).squeeze(-1))


class GroupedNet(nn.Module):
    """A convolution in groups and a dilated one, with dropout on both sides of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=2, dilation=2, groups=4)
        self.drop = nn.Dropout2d(0.1)

    def forward(self, image: Tensor) -> Tensor:
        return F.relu(self.conv2(self.drop(F.relu(self.drop(self.conv1(image))))))


class DecoderNet(nn.Module):
    """A convolution down and a transposed one up again."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.out(F.relu(self.up(F.relu(self.down(image)))))


class TiedNet(nn.Module):
    """One linear layer called twice, on inputs of different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.tied(3 * F.relu(self.tied(x)))))


@dataclass(frozen=True)
class Case:
    """A net and its calls.

    Attributes:
        build: makes the float net with random statistics in every BatchNorm, in eval mode.
        call: `(args, kwargs)` for a batch size.
        kinds: what its plan must run in integers, by number.
        exports: whether PyTorch's exporter takes its forward, which must not depend on the values of tensors.
    """

    name: str
    net: type[nn.Module]
    call: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    kinds: dict[str, int]
    exports: bool = True

    def build(self) -> nn.Module:
        torch.manual_seed(1)
        return with_statistics(self.net()).eval()


def with_statistics(model: nn.Module) -> nn.Module:
    """Give every BatchNorm gains, biases and running statistics that are not trivial."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.4, 1.6)
    return model


def _image(channels: int = 3, size: int = 8) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda batch: ((torch.randn(batch, channels, size, size),), {})


def _features(number: int) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda batch: ((torch.randn(batch, number),), {})


def _multi_modal(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = torch.arange(7) < torch.randint(1, 8, (batch, 1))
    return (), {"image": torch.randn(batch, 3, 8, 8), "tokens": torch.randint(11, (batch, 7)), "mask": mask}


def _views(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(batch, 2, 3, 6, 6),), {}


def _nested(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    sides = {"a": torch.randn(batch, 5), "b": 2 * torch.randn(batch, 5)}
    return (sides,), {"offset": torch.randn(batch, 3)}


CASES = [
    Case("residual", ResidualNet, _image(), {"conv2d": 3, "add": 1, "global_avg_pool": 1, "linear": 1}),
    Case("depthwise", DepthwiseNet, _image(4), {"conv2d": 3, "add": 1, "global_avg_pool": 1, "linear": 1}),
    Case("mlp", MLP, _features(6), {"linear": 3}),
    Case("drop_path", DropPathNet, _image(), {"conv2d": 2, "add": 1, "global_avg_pool": 1, "linear": 1}),
    Case("padded", PaddedNet, _image(3, 9), {"conv2d": 2}),
    Case("functional", FunctionalNet, _image(4), {"conv2d": 8}),
    Case(
        "shared_activation", SharedActivationNet, _image(), {"conv2d": 2, "add": 1, "global_avg_pool": 1, "linear": 2}
    ),
    Case("multi_modal", MultiModalNet, _multi_modal, {"conv2d": 1, "global_avg_pool": 1, "linear": 2}),
    Case("nested", DictNet, _nested, {"linear": 3, "add": 1}),
    Case("branching", BranchingNet, _image(), {"conv2d": 2, "linear": 1}, exports=False),
    Case("views", ViewsNet, _views, {"conv2d": 2, "linear": 1}),
    Case("norm_after_activation", NormAfterActivationNet, _image(), {"conv2d": 2}),
    Case(
        "squeeze_excite",
        SqueezeExciteNet,
        _image(),
        {"conv2d": 4, "global_avg_pool": 1, "sigmoid": 1, "mul": 1},
    ),
    Case("pooling", PoolingNet, _image(), {"conv2d": 3, "cat": 1, "avg_pool": 1, "linear": 1}),
    Case(
        "conv1d",
        Conv1dNet,
        lambda batch: ((torch.randn(batch, 2, 20),), {}),
        {"conv1d": 2, "global_avg_pool": 1, "linear": 1},
    ),
    Case("grouped", GroupedNet, _image(4), {"conv2d": 2}),
    Case("decoder", DecoderNet, _image(), {"conv2d": 2}),
    Case("tied", TiedNet, _features(6), {"linear": 3}),
]


def calibrated(
    case: Case, batches: int = 3, recipe: str | Recipe = "int8", runtime: str = "onnxruntime"
) -> tuple[nn.Module, Prepared]:
    """Return a case's float net and the same prepared, with the ranges of a few of its calls."""
    model = case.build()
    args, kwargs = case.call(4)
    prepared = prepare(model, args, kwargs, recipe=recipe, runtime=runtime, observer="min_max")
    calls = [case.call(4) for _ in range(batches)]
    calibrate(prepared, [functools.partial(model, *args, **kwargs) for args, kwargs in calls])
    return model, prepared
