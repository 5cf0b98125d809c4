"""What `coverage.py` quantizes: a float network with random weights, and inputs in the manner of its data."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Inputs = Callable[[int, int], Tensor]


class Case(NamedTuple):
    """A network with its data.

    Attributes:
        net: called with one tensor.
        inputs: gives that tensor for a number of samples and a seed.
        one_size: whether it answers a batch of one size alone.
    """

    net: nn.Module
    inputs: Inputs
    one_size: bool = False


def images(channels: int = 3, size: int = 64) -> Inputs:
    """Return images of blobs at several scales, as photographs have, about zero."""
    return functools.partial(_fields, (channels,), (size, size))


def clips(channels: int = 3, frames: int = 8, size: int = 32) -> Inputs:
    """Return clips of such images, `(N, channels, frames, size, size)`."""
    return functools.partial(_fields, (channels,), (frames, size, size))


def waves(channels: int = 1, length: int = 256) -> Inputs:
    """Return sums of sines of random pitch with some noise, `(N, channels, length)`."""
    return functools.partial(_waves, channels, length)


def series(length: int, features: int) -> Inputs:
    """Return such signals with time first, `(N, length, features)`."""
    return lambda number, seed: _waves(features, length, number, seed).transpose(1, 2).contiguous()


def tokens(vocabulary: int, length: int) -> Inputs:
    """Return token ids of which few are frequent, `(N, length)` int64."""

    def make(number: int, seed: int) -> Tensor:
        uniform = torch.rand(number, length, generator=torch.Generator().manual_seed(seed))
        return (vocabulary**uniform).long().clamp(0, vocabulary - 1)

    return make


def points(number_of_points: int, features: int = 3) -> Inputs:
    """Return sets of points, `(N, number_of_points, features)`."""

    def make(number: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        scale = 0.5 + torch.rand(number, 1, features, generator=generator)
        return scale * torch.randn(number, number_of_points, features, generator=generator)

    return make


def rows(numbers: int, categories: list[int]) -> Inputs:
    """Return rows of a table as one float tensor: numbers, then the index of each category."""

    def make(number: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        dense = torch.randn(number, numbers, generator=generator)
        chosen = [torch.randint(n, (number, 1), generator=generator).float() for n in categories]
        return torch.cat([dense, *chosen], 1)

    return make


def settled(net: nn.Module, inputs: Inputs) -> nn.Module:
    """Return the network in eval mode after a few batches in training mode, so that statistics are of its data."""
    net.train()
    with torch.no_grad():
        for seed in range(8):
            net(inputs(8, 1_000 + seed))
    return net.eval()


def _fields(channels: tuple[int, ...], sizes: tuple[int, ...], number: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    field = torch.zeros(number, *channels, *sizes)
    for cells in (1, 4, 16):
        small = torch.randn(number, *channels, *[min(cells, size) for size in sizes], generator=generator)
        field += F.interpolate(small, sizes, mode="trilinear" if len(sizes) == 3 else "bilinear")
    return field / 2 + 0.1 * torch.randn(field.shape, generator=generator)


def _waves(channels: int, length: int, number: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pitch = 0.02 + 0.3 * torch.rand(number, channels, 3, 1, generator=generator)
    loudness = torch.rand(number, channels, 3, 1, generator=generator)
    noise = torch.randn(number, channels, length, generator=generator)
    return (loudness * (pitch * torch.arange(length)).sin()).sum(2) + 0.05 * noise
