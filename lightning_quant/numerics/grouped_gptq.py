"""GPTQ for layers in groups that share nothing, such as depthwise convolutions: all groups in one operation.

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1, as in `gptq`; the groups stand along the first dimension.
"""

import torch
from torch import Tensor

from lightning_quant.numerics.gptq import gptq, inverse_factor


class GroupedCovariance:
    """How the inputs of each group vary around their mean.

    Attributes:
        total: `(groups, in_features, in_features)`, float64 sum of outer products of what is seen less its mean.
        count: number of inputs of a group.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.sum: Tensor | None = None
        self.count = 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in inputs `(groups, inputs, in_features)`, joined to those before by the means of both.

        Source: Chan et al. 1983, "Algorithms for computing the sample variance", equation 2.1.
        """
        count = x.shape[1]
        if not count:
            return
        mean = x.double().mean(1)
        centred = x - mean.unsqueeze(1).to(x)
        product = (centred.transpose(1, 2) @ centred).double()
        if self.total is None or self.sum is None:
            self.total, self.sum, self.count = product, mean * count, count
            return
        between = mean - self.sum / self.count
        weight = self.count * count / (self.count + count)
        self.total = self.total + product + weight * between.unsqueeze(2) * between.unsqueeze(1)
        self.sum, self.count = self.sum + mean * count, self.count + count

    @property
    def mean(self) -> Tensor:
        """The covariance, `(groups, in_features, in_features)`.

        Raises:
            ValueError: nothing was seen.
        """
        if self.total is None:
            raise ValueError("Expected inputs to have been seen, but got none.")
        return self.total / self.count


@torch.no_grad()
def grouped_gptq(
    weight: Tensor, covariance: Tensor, scale: Tensor, quant_max: int, *, dampening: float = 0.01
) -> Tensor:
    """Return the integers of a weight that keep the output of every group, float32, `(groups, out, in_features)`.

    Args:
        weight: `(groups, out_features, in_features)`.
        covariance: `(groups, in_features, in_features)`, of the inputs.
        scale: `(groups, out_features)`, positive.
        quant_max: highest integer of the grid, which is symmetric.
        dampening: share of the mean diagonal that is added to the diagonal.
    """
    if len(weight) == 1:
        return gptq(weight[0], covariance[0], scale[0], -quant_max, quant_max, dampening=dampening).float().unsqueeze(0)
    columns = weight.shape[2]
    working, hessian, scale = weight.double(), covariance, scale.double()
    order = hessian.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    hessian = hessian.gather(1, order.unsqueeze(2).expand_as(hessian)).gather(2, order.unsqueeze(1).expand_as(hessian))
    by_order = order.unsqueeze(1).expand_as(working)
    working = working.gather(2, by_order)
    # A group whose inputs never change is rounded to nearest.
    inverse = inverse_factor(hessian, dampening)
    integers = torch.empty_like(working)
    for column in range(columns):
        values = working[:, :, column]
        integers[:, :, column] = torch.round(values / scale).clamp(-quant_max, quant_max)
        error = (values - integers[:, :, column] * scale) / inverse[:, column, column].unsqueeze(1)
        working[:, :, column + 1 :] -= error.unsqueeze(2) * inverse[:, column, column + 1 :].unsqueeze(1)
    return torch.empty_like(integers).scatter_(2, by_order, integers).float()


def grouped_error(difference: Tensor, covariance: Tensor) -> float:
    """Return the mean squared error around their mean of all outputs, for a difference `(groups, out, in_features)`.

    In float32: of wide layers this product is most of the work, and errors that are apart by less decide nothing.
    """
    return float(((difference @ covariance.float()) * difference).sum(dtype=torch.float64))
