"""A network with one layer that few bits do not hold."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Coarse(nn.Module):
    """Layers in a row, one of which has a weight in each row, of an input that is zero, that widens its grid."""

    def __init__(self, width: int, bad: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.spoil(bad)

    @torch.no_grad()
    def spoil(self, bad: int) -> None:
        """Make a layer, from the second one on, the bad one."""
        self.layers[bad - 1].weight[0] = self.layers[bad - 1].bias[0] = 0.0
        self.layers[bad].weight[:, 0] = 4.0

    def forward(self, x: Tensor) -> Tensor:
        """Apply all layers, with ReLU between them."""
        for layer in self.layers:
            x = F.relu(layer(x)) if layer is not self.layers[-1] else layer(x)
        return x
