"""The integers that a tensor is rounded to: one value, carried from the recipe to the file."""

from dataclasses import dataclass

import torch

from lightning_quant.arguments.arguments import check_flag
from lightning_quant.arguments.keywords import known_arguments
from lightning_quant.errors import QuantizationError


@dataclass(frozen=True)
class Grid:
    """The integers of one tensor.

    Attributes:
        low: lowest integer.
        high: highest integer.
        dtype: what they are stored as.
        axis: dimension along which each place has a scale of its own; None where the tensor has one.
        symmetric: whether the integer in the middle stands for 0.0; otherwise that follows from the range.
    """

    low: int
    high: int
    dtype: torch.dtype
    axis: int | None = None
    symmetric: bool = False

    @property
    def num_levels(self) -> int:
        """Number of integers."""
        return self.high - self.low + 1

    @property
    def middle(self) -> int:
        """The integer that stands for 0.0 where the grid is symmetric."""
        return (self.low + self.high + 1) // 2

    @property
    def fills_type(self) -> bool:
        """Whether it has every integer of its type, which kernels clip to by themselves."""
        info = torch.iinfo(self.dtype)
        return (self.low, self.high) == (info.min, info.max)

    def __str__(self) -> str:
        kind = "symmetric " if self.symmetric else ""
        return f"{kind}[{self.low}, {self.high}] in {str(self.dtype).removeprefix('torch.')}"


def activation_grid(bits: int, *, symmetric: bool = False) -> Grid:
    """Return the grid of activations with so many bits, in the smallest type that holds it.

    It is unsigned, as the kernels of x86 want it: what others call int8 with 0 for 0.0 are the same values. Those of
    XNNPACK, which are signed, get it so.
    """
    return Grid(0, 2**bits - 1, torch.uint8 if bits <= 8 else torch.uint16, symmetric=symmetric)


# Kernels clip to the ends of the storage type: these are all of it.
UINT8 = activation_grid(8)
INTEGERS_8 = frozenset({UINT8, activation_grid(8, symmetric=True)})
# In the same type: what kernels leave beyond their ends, a clip of integers takes away.
FEWER_THAN_8 = frozenset(activation_grid(bits, symmetric=s) for bits in range(2, 8) for s in (False, True))
INTEGERS_16 = frozenset({activation_grid(16), activation_grid(16, symmetric=True)})


def widened(grid: Grid, more_bits: int) -> Grid:
    """Return a grid of activations with so many bits more, up to eight."""
    bits = grid.num_levels.bit_length() - 1
    return activation_grid(max(bits, min(bits + more_bits, 8)), symmetric=grid.symmetric)


def weight_grid(bits: int) -> Grid:
    """Return the grid of weights with so many bits: as many integers below zero as above it."""
    highest = 2 ** (bits - 1) - 1
    return Grid(-highest, highest, torch.int8, axis=0, symmetric=True)


@known_arguments
@dataclass(frozen=True)
class IntegerSpec:
    """The integer grid of one tensor role.

    Attributes:
        bits: width of the grid, in [2, 8] for weights and [2, 16] for activations; stored in 8 or in 16 bits.
        symmetric: whether 0.0 is in the middle: weights are in [-(2**(bits-1)-1), 2**(bits-1)-1] steps, activations
            down to one more. Otherwise the grid follows the range, with a zero point that represents 0.0 exactly.
        per_channel: whether there is one scale for each output channel, `(out_channels,)`; otherwise there is one for
            the tensor.
    """

    bits: int = 8
    symmetric: bool = False
    per_channel: bool = False

    def __post_init__(self) -> None:
        for name in ("symmetric", "per_channel"):
            check_flag(name, getattr(self, name))
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            raise QuantizationError(
                f"Expected `bits` to be in [2, 16], but got {self.bits!r}: no runtime here has wider grids. Keep "
                "layers float with `overrides` or `exclude`."
            )
