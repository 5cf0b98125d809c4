"""Products of groups of rows, each with a weight of its own: what mixtures of experts compute."""

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("lightning_quant", "FRAGMENT")
_LIBRARY.define("grouped_product(Tensor x, Tensor weight, Tensor ends) -> Tensor")


@torch.no_grad()
def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of rows by its weight; rows behind the last group give zeros.

    Args:
        x: `(rows, in_features)`, sorted by group.
        weight: `(groups, in_features, out_features)`.
        ends: `(groups,)`, integers, the row after each group's last.
    """
    if weight.dim() != 3 or x.dim() != 2 or ends.shape != weight.shape[:1] or x.shape[1] != weight.shape[1]:
        raise ValueError(f"rows {tuple(x.shape)}, weight {tuple(weight.shape)}, ends {tuple(ends.shape)} do not fit")
    result = x.new_zeros(x.shape[0], weight.shape[2])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if not start <= end <= x.shape[0]:
            raise ValueError(f"group {group} of {x.shape[0]} rows is from {start} to {end}")
        torch.mm(x[start:end], weight[group], out=result[start:end])
        start = end
    return result


def _shape(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


_LIBRARY.impl("grouped_product", grouped_product, "CompositeExplicitAutograd")
torch.library.register_fake("lightning_quant::grouped_product", _shape, lib=_LIBRARY)
