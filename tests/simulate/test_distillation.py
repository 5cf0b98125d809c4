"""A teacher pulls answers by the gradient of its loss, and leaves the module as it is."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.errors import NoEffectWarning, QuantizationError
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


def test_single_logits_have_the_divergence_of_their_sigmoid() -> None:
    torch.manual_seed(0)
    for shape in ((6,), (6, 1)):
        answer, target = torch.randn(shape, requires_grad=True), torch.randn(shape)
        own, other = (torch.stack((x.sigmoid(), 1 - x.sigmoid()), -1) for x in (answer / 3, target / 3))
        loss = 9 * F.kl_div(own.log().flatten(0, -2), other.flatten(0, -2), reduction="batchmean")
        (expected,) = torch.autograd.grad(loss, answer)
        torch.testing.assert_close(slope(answer.detach(), target, 3.0), expected)


def test_outputs_without_variance_pull_no_harder_than_others() -> None:
    for target in (torch.full((1, 1), 2.0), torch.full((8, 3), 2.0), torch.tensor([2.0, 2.0 + 1e-6])):
        pull = slope(target * 1.01, target)
        assert 0 < pull.sum() < 3, "a hundredth of the answer, in units of a tenth of it"


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_a_loss_that_the_module_computes_itself_is_not_taught(temperature: float | None) -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.layer(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits, "classes": labels}

    torch.manual_seed(0)
    net, x, labels = WithLoss(), torch.randn(8, 4), torch.arange(8) % 3
    teacher = Teacher(Distill(1.0, temperature), lambda: 1.0)
    teacher.begin(net, [], (x, labels), {})
    loss = torch.tensor(2.0, requires_grad=True)
    logits = torch.randn(8, 3, requires_grad=True)
    taught = teacher.teach({"loss": loss, "logits": logits, "classes": labels})
    taught["loss"].backward()
    assert loss.grad == 1
    torch.testing.assert_close(logits.grad, slope(logits.detach(), net.layer(x).detach(), temperature))


def test_answers_may_be_changed_in_place() -> None:
    net, x = Net(), torch.randn(8, 4)
    teacher = Teacher(Distill(1.0), lambda: 1.0)
    teacher.begin(net, [], (x,), {})
    logits = torch.randn(8, 3, requires_grad=True)
    taught = teacher.teach({"logits": logits})["logits"]
    taught[:, 0] = -1e4
    taught.softmax(-1).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_it_is_said_once_where_there_is_nothing_to_compare() -> None:
    class WithHead(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return (super().forward(x), x) if self.training else super().forward(x)

    net, teacher = WithHead(4, 3), Teacher(Distill(1.0), lambda: 1.0)
    teacher.begin(net, [], (torch.randn(2, 4),), {})
    with pytest.warns(NoEffectWarning, match="no effect on outputs of a WithHead.*in evaluation"):
        teacher.teach(net(torch.randn(2, 4)))
    teacher.begin(net, [], (torch.randn(2, 4),), {})
    teacher.teach(net(torch.randn(2, 4)))


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
