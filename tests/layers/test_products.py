"""Only parameters that a call multiplies by are weights."""

import torch
from torch import Tensor, nn

from lightning_quant.layers.products import MIN_VALUES, multiplied


class Own(nn.Module):
    """Multiplies by some of its parameters, adds another, and scales by the last."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.indexed = nn.Parameter(torch.randn(32, 64)), nn.Parameter(torch.randn(2, 64, 32))
        self.table, self.gain = nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.randn(64, 32))
        self.small, self.unused = nn.Parameter(torch.randn(32, 8)), nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        y = (x @ self.weight) @ self.indexed[torch.tensor([1])][0]
        return ((y + self.table[: len(x)]) * self.gain[: len(x)]) @ self.small


def test_weights_of_products_are_found_directly_and_behind_what_moves_them() -> None:
    model, x = Own().train(), torch.randn(3, 32)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()

    assert {names[key] for key in multiplied(model, [model], (x,), {})} == {"weight", "indexed"}
    assert model.small.numel() < MIN_VALUES
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_are_scaled_for_each_sample_are_weights() -> None:
    class Modulated(Own):
        def forward(self, x: Tensor, style: Tensor) -> Tensor:
            weight = self.weight * style.unsqueeze(2)
            weight = weight * weight.square().sum(1, keepdim=True).rsqrt()
            return torch.bmm(x.unsqueeze(1), weight).squeeze(1) @ self.small.new_ones(64, 8)

    model = Modulated()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[key] for key in multiplied(model, [model], tuple(torch.randn(2, 3, 32)), {})] == ["weight"]


def test_modules_without_parameters_of_their_own_are_not_run() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("was run")

    assert multiplied(Failing(), [Failing()], (torch.ones(1),), {}) == set()
