"""A teacher pulls answers by the gradient of its loss, and leaves the module as it is."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.errors import QuantizationError
from lightning_quant.simulate.distillation import Distill, Teacher, read_distill, slope


def test_slope_is_the_gradient_of_the_loss() -> None:
    torch.manual_seed(0)
    answer, target = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    losses = {
        None: F.mse_loss(answer, target) / target.var(correction=0),
        3.0: 9 * F.kl_div((answer / 3).log_softmax(-1), (target / 3).softmax(-1), reduction="batchmean"),
    }
    for temperature, loss in losses.items():
        (expected,) = torch.autograd.grad(loss, answer)
        torch.testing.assert_close(slope(answer.detach(), target, temperature), expected)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.drop(self.norm(self.layer(x)))}


def test_answers_are_pulled_towards_the_present_float_forward() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(8, 4)
    teacher = Teacher(Distill(2.0), lambda: 0.5)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for _ in range(2):
        answer, inner = (torch.randn(8, 3, requires_grad=True) for _ in range(2))
        drawn = torch.get_rng_state()
        teacher.begin(net, ["layer"], (x,), {})
        teacher.pulled("layer", inner).sum().backward()
        torch.testing.assert_close(inner.grad, 1 + slope(inner.detach(), net.layer(x).detach()))
        taught = teacher.teach({"logits": answer})
        assert torch.equal(torch.get_rng_state(), drawn)
        torch.testing.assert_close(taught["logits"], answer)
        taught["logits"].sum().backward()
        with torch.no_grad():
            target = net.eval()(x)["logits"]
        net.train()
        assert answer.grad is not None
        torch.testing.assert_close(answer.grad, 1 + slope(answer.detach(), target))
        assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
        # Weights that are replaced are followed.
        net.load_state_dict({name: torch.rand_like(tensor.float()) for name, tensor in before.items()}, assign=True)
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0.5", "Expected `distill` to be a weight such as 0.5"),
        (True, "Expected `distill` to be a weight such as 0.5"),
        ({"wieght": 1.0}, "Did you mean 'weight'"),
        (-1.0, "Expected `distill.weight` to be 0 or more"),
        ({"temperature": 0.0}, "Expected `distill.temperature` to be"),
    ],
)
def test_wrong_arguments_are_refused(given: Any, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        read_distill(given)
