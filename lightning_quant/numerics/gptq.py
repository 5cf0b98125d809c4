"""GPTQ: round the weights of a linear layer one input after the other, and let the rest make up for each error.

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1, with the Cholesky form of the inverse Hessian, blocks of
lazily updated columns (section 3.3) and dampening of one percent of the mean diagonal.
"""

import torch
from torch import Tensor

_BLOCK = 128
# Share of an input's power below which what changes of it is rounding error.
_CONSTANT = 1e-10


class Hessian:
    """The second moment of a layer's inputs, which is the Hessian of its squared output error up to a factor.

    Attributes:
        total: `(in_features, in_features)`, float64 sum of outer products; it and all below lie where the inputs do.
        sum: `(in_features,)`, float64 sum of the inputs.
        count: number of inputs.
    """

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        self.total = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.sum = torch.zeros(features, dtype=torch.float64, device=device)
        self.count = 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in inputs of shape `(..., in_features)`."""
        x = x.detach().reshape(-1, x.shape[-1]).double()
        self.total += x.T @ x
        self.sum += x.sum(0)
        self.count += len(x)

    @property
    def mean(self) -> Tensor:
        """The sum over the number of inputs, float64."""
        return self.total / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """The mean less that of the inputs' own mean, for layers whose bias makes up for errors that never change.

        Zero for an input that never changes, of which the difference would leave a rounding error of either sign.
        """
        center, mean = self.sum / max(self.count, 1), self.mean
        covariance = mean - torch.outer(center, center)
        constant = covariance.diagonal() <= _CONSTANT * mean.diagonal()
        return covariance.masked_fill(constant.unsqueeze(0) | constant.unsqueeze(1), 0.0)


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    zero_point: Tensor | None = None,
    dampening: float = 0.01,
) -> Tensor:
    """Return the integers of a weight that keep the layer's output, int32, `(out_features, in_features)`.

    Args:
        weight: `(out_features, in_features)`.
        hessian: `(in_features, in_features)`, second moment of the inputs; see `Hessian`.
        scale: `(out_features, in_features // group_size)` or `(out_features,)`, positive.
        quant_min: lowest integer of the grid.
        quant_max: highest integer of the grid.
        zero_point: like `scale`, the integer of 0.0; zero when left out.
        dampening: share of the mean diagonal that is added to the diagonal.
    """
    rows, columns = weight.shape
    scales, zeros = _by_column(scale, columns), _by_column(scale * 0 if zero_point is None else zero_point, columns)
    device = hessian.device
    hessian = hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    # Inputs with much power first (the paper's "act-order"), while many weights are left to make up for their errors.
    order = torch.argsort(hessian.diagonal() * ~dead, descending=True)
    # Inputs along the first dimension: what is worked on at a time lies together.
    working, scales, zeros = (x.to(device, torch.float64).T[order] for x in (weight.detach(), scales, zeros))
    inverse = inverse_factor(hessian[order][:, order], dampening)
    integers = torch.empty_like(working)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.zeros(end - start, rows, dtype=torch.float64, device=device)
        for column in range(start, end):
            values, step, zero = working[column], scales[column], zeros[column]
            integers[column] = torch.round(values / step + zero).clamp(quant_min, quant_max)
            error = (values - (integers[column] - zero) * step) / inverse[column, column]
            working[column:end] -= inverse[column, column:end].unsqueeze(1) * error
            errors[column - start] = error
        working[end:] -= inverse[start:end, end:].T @ errors
    result = torch.empty_like(integers)
    result[order] = integers
    return result.T.to(weight.device, torch.int32, memory_format=torch.contiguous_format)


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Return the mean squared error of the layer's outputs, summed over outputs, for inputs with this second moment."""
    difference = (weight - rounded).to(hessian.device, torch.float64)
    return float(((difference @ hessian.double()) * difference).sum())


def _by_column(values: Tensor, columns: int) -> Tensor:
    values = values.double()
    values = values.unsqueeze(1) if values.dim() == 1 else values
    return values.repeat_interleave(columns // values.shape[1], 1)


def inverse_factor(hessian: Tensor, dampening: float) -> Tensor:
    """Return the upper Cholesky factors of the inverses of dampened Hessians, `(..., in_features, in_features)`.

    Sums in float32 can leave a matrix of many features without one: it is dampened more, then.

    Args:
        hessian: symmetric, float64.
        dampening: share of the mean diagonal that is added to the diagonal; 1 is added where that mean is 0.

    Raises:
        torch.linalg.LinAlgError: a value is not finite.
    """
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    for more in (1, 10, 100, 1000):
        dampened = hessian.clone()
        dampened.diagonal(dim1=-2, dim2=-1).add_(torch.where(mean > 0, dampening * more * mean, torch.ones_like(mean)))
        lower, failed = torch.linalg.cholesky_ex(dampened)
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.any():
                return upper
    return torch.linalg.cholesky(dampened, upper=True)
