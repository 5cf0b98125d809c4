"""Take the systematic part of the weights' rounding error out of the biases.

Rounding a weight shifts the mean of a layer's output by the rounding error times the mean of its input, which is large
after a ReLU and where a BatchNorm with a high gain follows. Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2:
E[y~] - E[y] = (W~ - W) E[x], here with means measured on calibration data and zero padding at the borders left out.
"""

import torch
from torch import Tensor

from lightning_quant.numerics.fake_quantize import along
from lightning_quant.numerics.folding import Folded


class InputMeans:
    """The mean of what each weighted operator reads, per input channel.

    Attributes:
        means: operator to `(in_channels,)`, float64.
        counts: operator to the number of values behind each mean.
    """

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def update(self, identity: str, kind: str, x: Tensor) -> None:
        """Take in one input: `(batch, channels, ...)` of a convolution, `(..., features)` of a linear layer."""
        x = x.reshape(-1, x.shape[-1]) if kind == "linear" else x
        if x.numel() == 0:
            return
        # Not row by row: channels would have to be moved to the end first, which takes longer than the mean.
        self.join(identity, x.double().mean([d for d in range(x.dim()) if d != 1]), x.numel() // x.shape[1])

    def join(self, identity: str, mean: Tensor, count: int) -> None:
        """Take in the mean of some values of each channel."""
        seen = self.counts.get(identity, 0)
        previous = self.means.get(identity, torch.zeros_like(mean))
        self.means[identity] = previous + (mean - previous) * (count / (seen + count))
        self.counts[identity] = seen + count


@torch.no_grad()
def bias_correction(weight: Tensor, folded: Folded, integers: Tensor, mean: Tensor) -> Tensor:
    """Return what to add to a folded bias, `(out_channels,)`, so that the mean of the output stays.

    Args:
        weight: `(out_channels, in_channels // groups, ...)`, before folding.
        folded: the layer's scales.
        integers: the folded weight in whole steps.
        mean: `(in_channels,)`, of the layer's input.
    """
    exact = weight.double() if folded.gain is None else weight.double() * along(folded.gain.double(), weight)
    return mean_shift(integers.double() * along(folded.scale.double(), weight) - exact, mean)


def mean_shift(error: Tensor, mean: Tensor) -> Tensor:
    """Return what takes a weight's error out of the mean of the output, `(out_channels,)`.

    Args:
        error: `(out_channels, in_channels // groups, ...)`, of the weight.
        mean: `(in_channels,)`, of the input.
    """
    groups = len(mean) // error.shape[1]
    error = error.flatten(2).sum(2) if error.dim() > 2 else error
    by_group = mean.view(groups, 1, -1).expand(-1, len(error) // groups, -1).reshape(len(error), -1)
    return -(error * by_group.to(error)).sum(1).float()
