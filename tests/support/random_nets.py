"""Random small nets out of the operators that run in integers: what test_random_nets.py draws from."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

ACTIVATIONS = {
    "": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
}
BETWEEN = {"": nn.Sequential, "identity": nn.Identity, "dropout": lambda: nn.Dropout(0.1)}


@dataclass(frozen=True)
class Block:
    """One layer and what follows it; `residual` adds its input where the shapes are equal.

    `shared` calls the layer of the block before once more, where it fits; `between` stands on both sides of the norm.
    """

    width: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    bias: bool = True
    norm: bool = False
    activation: str = ""
    residual: bool = False
    shared: bool = False
    pool: str = ""
    between: str = ""


@dataclass(frozen=True)
class Spec:
    """A whole net: convolutions on images, or linear layers on vectors."""

    images: bool
    size: int
    channels: int
    blocks: tuple[Block, ...]
    global_pool: bool
    classes: int
    batch: int
    seed: int


@st.composite
def specs(draw: Any) -> Spec:
    images = draw(st.booleans())
    block = st.builds(
        Block,
        width=st.integers(1, 8),
        kernel=st.sampled_from([1, 2, 3]),
        stride=st.sampled_from([1, 1, 2]),
        groups=st.sampled_from([1, 1, 2, 4]),
        bias=st.booleans(),
        norm=st.booleans(),
        activation=st.sampled_from(sorted(ACTIVATIONS)),
        residual=st.booleans(),
        shared=st.booleans(),
        pool=st.sampled_from(["", "", "max", "avg"]),
        between=st.sampled_from(sorted(BETWEEN)),
    )
    spec = Spec(
        images=images,
        size=draw(st.integers(8, 13)),
        channels=draw(st.integers(1, 4)),
        blocks=tuple(draw(st.lists(block, min_size=1, max_size=4))),
        global_pool=draw(st.booleans()),
        classes=draw(st.integers(1, 5)),
        batch=draw(st.integers(2, 5)),
        seed=draw(st.integers(0, 2**16)),
    )
    assume(_leaves_pixels(spec))
    return spec


def _leaves_pixels(spec: Spec) -> bool:
    """Tell whether no pool stands where strides have left a single pixel."""
    try:
        RandomNet(spec)
    except RuntimeError as error:
        if "too small" in str(error):
            return False
        raise
    return True


class RandomNet(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        torch.manual_seed(spec.seed)
        self.spec = spec
        self.adds: list[bool] = []
        self.layers, self.norms, self.activations = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.between = nn.ModuleList(BETWEEN[block.between]() for block in spec.blocks)
        width, last = spec.channels, None
        for block in spec.blocks:
            reuse = block.shared and last is not None and last[1] == last[2] == width
            layer = last[0] if reuse else self._layer(width, block)
            out = width if reuse else block.width
            last = (layer, width, out)
            self.layers.append(layer)
            self.norms.append(self._norm(out) if block.norm else nn.Identity())
            self.activations.append(ACTIVATIONS[block.activation]())
            self.adds.append(block.residual and self._keeps_shape(layer, width))
            width = out
        with torch.no_grad():
            features = self.features(self.example()).shape[1]
        self.head = nn.Linear(features, spec.classes)

    def _layer(self, width: int, block: Block) -> nn.Module:
        if not self.spec.images:
            return nn.Linear(width, block.width, bias=block.bias)
        groups = block.groups if width % block.groups == block.width % block.groups == 0 else 1
        padding = block.kernel // 2
        return nn.Conv2d(width, block.width, block.kernel, block.stride, padding, groups=groups, bias=block.bias)

    def _keeps_shape(self, layer: Any, width: int) -> bool:
        if isinstance(layer, nn.Linear):
            return layer.out_features == width
        return layer.out_channels == width and layer.stride == (1, 1) and layer.kernel_size[0] % 2 == 1

    def _norm(self, width: int) -> nn.Module:
        norm = (nn.BatchNorm2d if self.spec.images else nn.BatchNorm1d)(width)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 2.0)
        return norm

    def example(self) -> Tensor:
        spec = self.spec
        shape = (spec.batch, spec.channels, spec.size, spec.size) if spec.images else (spec.batch, spec.channels)
        return torch.randn(shape, generator=torch.Generator().manual_seed(spec.seed))

    def features(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.spec.blocks):
            between = self.between[index]
            y = between(self.norms[index](between(self.layers[index](x))))
            x = self.activations[index](x + y if self.adds[index] else y)
            if block.pool and self.spec.images:
                x = F.max_pool2d(x, 2, 1) if block.pool == "max" else F.avg_pool2d(x, 2, 1, padding=1)
        if self.spec.images and self.spec.global_pool:
            x = F.adaptive_avg_pool2d(x, 1)
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
