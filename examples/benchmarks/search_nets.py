"""Tiny nets with planted bad layers, labels that they get right nine times in ten, and limits drawn at random."""

import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

KINDS = ("perceptron", "convolutions", "residual", "depthwise", "lstm", "transformer")
CLASSES, BATCH = 10, 500
NUMBERS = {"calibration": 256, "validation": 4000, "unseen": 10000}
# Features of a row, of a step of a sequence, and the size of an image.
FEATURES, STEPS, SIDE = 16, 6, 5


class Block(nn.Module):
    """Attention of one head, then two linear layers, each added to what it read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.query, self.key, self.value, self.out = (
            nn.LayerNorm(width),
            *(nn.Linear(width, width) for _ in range(4)),
        )
        self.up, self.down, self.second_norm = (
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
            nn.LayerNorm(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, steps, width)` to the same."""
        y = self.norm(x)
        x = x + self.out(F.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y)))
        return x + self.down(F.relu(self.up(self.second_norm(x))))


class Net(nn.Module):
    """Layers in a row between a first layer and a head; residual ones add what two layers make of it.

    Attributes:
        kind: one of `KINDS`.
        shape: of an input.
        pairs: names of layers that can be made bad, and of what reads each.
    """

    def __init__(self, kind: str, depth: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        of_images = kind in ("convolutions", "residual", "depthwise")
        self.shape: tuple[int, ...] = (3, SIDE, SIDE) if of_images else (FEATURES,)
        if kind in ("lstm", "transformer"):
            self.shape = (STEPS, FEATURES)
        self.first = nn.Conv2d(3, width, 3, padding=1) if of_images else nn.Linear(FEATURES, width)
        if kind == "lstm":
            self.recurrent = nn.LSTM(width, width, batch_first=True)
        self.layers = nn.ModuleList(
            Block(width)
            if kind == "transformer"
            else nn.Linear(width, width)
            if not of_images
            else nn.Conv2d(width, width, 1)
            if kind == "depthwise" and index % 2
            else nn.Conv2d(width, width, 3, padding=1, groups=width if kind == "depthwise" else 1)
            for index in range(max(1, depth // 3) if kind == "transformer" else depth)
        )
        self.head = nn.Linear(width, CLASSES)
        self.pairs = [(f"layers.{i}", f"layers.{i + 1}") for i in range(len(self.layers) - 1)]
        if kind == "residual":
            self.pairs = self.pairs[::2]
        if kind == "transformer":
            self.pairs = [(f"layers.{i}.up", f"layers.{i}.down") for i in range(len(self.layers))]
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Score a batch."""
        x = F.relu(self.first(x))
        if self.kind == "lstm":
            x = self.recurrent(x)[0][:, -1]
        before = x
        for index, layer in enumerate(self.layers):
            x = layer(x) if self.kind == "transformer" else F.relu(layer(x))
            if self.kind == "residual" and index % 2:
                x = before = before + x
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x.mean(1) if x.dim() == 3 else x)


@dataclass
class Task:
    """A net with planted bad layers, its data, and a limit.

    Attributes:
        net: the float net.
        bad: names of the layers that are bad.
        limit: by how much accuracy may fall.
        data: inputs and labels of calibration, validation and what nobody has seen.
    """

    net: Net
    bad: list[str]
    limit: float
    data: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@torch.no_grad()
def task(seed: int, names: tuple[str, ...] = tuple(NUMBERS)) -> Task:
    """Make a net and these parts of its data."""
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    torch.manual_seed(seed)
    kind = chance.choice(KINDS)
    net = Net(kind, chance.randint(2, 5), chance.choice([8, 12])).eval()
    pairs = chance.sample(net.pairs, min(chance.choice([1, 1, 2]), len(net.pairs)))
    for layer, reader in pairs:
        _make_bad(net.get_submodule(layer), net.get_submodule(reader), chance)
    made = Task(net, [layer for layer, _ in pairs], chance.choice([0.01, 0.02, 0.04, 0.06]))
    for name in names:
        inputs = torch.randn(NUMBERS[name], *net.shape, generator=generator)
        logits = torch.cat([net(batch) for batch in inputs.split(BATCH)])
        if not made.data:
            spread, middle = logits.std(0) + 1e-6, logits.mean(0)
            net.head.weight.div_(spread[:, None])
            net.head.bias.copy_((net.head.bias - middle) / spread)
            logits = (logits - middle) / spread
        wrong = torch.rand(len(inputs), generator=generator) < 0.1
        others = torch.randint(CLASSES, (len(inputs),), generator=generator)
        made.data[name] = inputs, torch.where(wrong, others, logits.argmax(1))
    return made


def _make_bad(layer: nn.Module, reader: nn.Module, chance: random.Random) -> None:
    """Let two channels of a layer be far too large, and nobody read them."""
    channels = chance.sample(range(layer.weight.shape[0]), 2)
    layer.bias[channels] = 10 ** chance.uniform(1.5, 3.5)
    if getattr(reader, "groups", 1) > 1:
        reader.weight[channels] = 0.0
    else:
        reader.weight[:, channels] = 0.0
