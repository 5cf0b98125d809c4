import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_quant.capture.capture import StepStoppedError, capture, find_module, isolated_rng, unchanged
from lightning_quant.errors import CaptureError


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.head(self.conv(x).mean((2, 3))) * scale


class LearnedMetric(Metric):
    """A metric with a network inside, such as a perceptual distance."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.add_state("total", torch.zeros(()))

    def update(self, x: Tensor) -> None:
        self.total += self.net(x).detach().sum()

    def compute(self) -> Tensor:
        return self.total


class LearnedLoss(nn.modules.loss._Loss):
    """A loss with a layer inside, such as one with learned class centres."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().mean()


class Task(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Backbone()
        self.metric = LearnedMetric()
        self.loss = LearnedLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def through_child(self, x: Tensor) -> Tensor:
        output = self.net(x, scale=2.0)
        self.metric(output)
        return self.loss(output)

    def through_itself(self, x: Tensor) -> Tensor:
        return self.loss(self(x))


@pytest.fixture
def task() -> Task:
    return Task()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 1, 5, 5)


def test_finds_the_child_that_the_step_calls(task: Task, x: Tensor) -> None:
    found = capture(task, lambda: task.through_child(x))

    assert found.path == "net"
    assert torch.equal(found.args[0], x)
    assert found.kwargs == {"scale": 2.0}


def test_finds_the_root_when_the_step_calls_its_own_forward(task: Task, x: Tensor) -> None:
    assert capture(task, lambda: task.through_itself(x)).path == ""


def test_metrics_and_losses_with_layers_are_never_chosen(task: Task, x: Tensor) -> None:
    def step() -> None:
        task.metric(x[:, 0, 0, :3])
        task.loss(x[:, 0, 0, :3])

    with pytest.raises(CaptureError, match=r"it calls none\. Name it with `module=\.\.\.`"):
        capture(task, step)


def test_outermost_module_wins_over_its_children(x: Tensor) -> None:
    nested = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Conv2d(2, 2, 1))))

    assert capture(nested, lambda: nested[0](x)).path == "0"


def test_a_call_inside_the_module_is_not_the_module(task: Task, x: Tensor) -> None:
    # `conv` runs first on its own and then inside `net`: both are independent calls of the step.
    def step() -> None:
        task.net.conv(x)
        task.net(x)

    with pytest.raises(CaptureError, match=r"'net\.conv' .*, 'net' "):
        capture(task, step)


def test_frozen_teacher_is_left_out(x: Tensor) -> None:
    both = nn.ModuleDict({"teacher": Backbone(), "student": Backbone()})
    both["teacher"].requires_grad_(False)

    assert capture(both, lambda: (both["teacher"](x), both["student"](x))).path == "student"


def test_a_module_that_is_frozen_as_a_whole_is_still_found(x: Tensor) -> None:
    frozen = nn.ModuleDict({"net": Backbone()}).requires_grad_(False)

    assert capture(frozen, lambda: frozen["net"](x)).path == "net"


def test_two_independent_modules_are_refused_and_both_named(x: Tensor) -> None:
    both = nn.ModuleDict({"generator": Backbone(), "critic": Backbone()})

    with pytest.raises(CaptureError, match=r"2 independent ones: 'generator' \(50.0% of .*bytes\), 'critic' ") as error:
        capture(both, lambda: (both["generator"](x), both["critic"](x)))
    assert 'Choose one, `module="generator"`' in str(error.value)
    assert "one `forward`" in str(error.value)


def test_of_several_modules_the_one_that_makes_nearly_all_is_taken(x: Tensor) -> None:
    both = nn.ModuleDict({"scale": nn.Linear(5, 1), "net": Backbone(), "out": nn.Linear(3, 2)})
    both["net"].conv = nn.Conv2d(1, 2, 3, padding=4)

    found = capture(both, lambda: (both["scale"](x[0, 0]), both["out"](both["net"](x))))

    assert found.path == "net"
    assert set(found.beside) == {"scale", "out"}


def test_named_module_ends_the_step_at_its_call(x: Tensor) -> None:
    both = nn.ModuleDict({"generator": Backbone(), "critic": Backbone()})
    reached = []

    def step() -> None:
        both["critic"](x)
        reached.append("after")

    found = capture(both, step, "critic")

    assert found.path == "critic"
    assert torch.equal(found.args[0], x)
    assert reached == []


def test_user_code_that_catches_every_exception_does_not_hide_the_stop(task: Task, x: Tensor) -> None:
    reached = []

    def step() -> None:
        try:
            task.net(x)
        except Exception:  # what some training steps do around a forward
            reached.append("swallowed")

    assert capture(task, step, "net").path == "net"
    assert reached == []
    assert not issubclass(StepStoppedError, Exception)


def test_unknown_name_offers_the_closest_one(task: Task, x: Tensor) -> None:
    with pytest.raises(CaptureError, match=r"`module` .* of Task, but got 'nett'\. Did you mean 'net'"):
        capture(task, lambda: task.through_child(x), "nett")
    with pytest.raises(CaptureError, match=r"but got 'self\.net'\. Did you mean 'net'"):
        find_module(task, "self.net")
    with pytest.raises(CaptureError, match=r"Children are \['net', 'metric', 'loss'\]"):
        find_module(task, "completely.different")


def test_named_module_that_is_never_called_is_refused(task: Task, x: Tensor) -> None:
    with pytest.raises(CaptureError, match=r"Expected the training step to call `module` 'metric\.net'"):
        capture(task, lambda: task.net(x), "metric.net")


def test_first_call_is_recorded(task: Task, x: Tensor) -> None:
    found = capture(task, lambda: (task.net(x), task.net(x + 1)))

    assert torch.equal(found.args[0], x)


def test_recorded_tensors_are_copies_without_history(task: Task, x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    found = capture(task, lambda: task.net(leaf * 2))
    expected = 2 * x
    with torch.no_grad():
        leaf.zero_()

    assert torch.equal(found.args[0], expected)
    assert not found.args[0].requires_grad


def test_hooks_are_gone_afterwards_even_when_the_step_raises(task: Task, x: Tensor) -> None:
    def step() -> None:
        task.net(x)
        raise RuntimeError("the user's own error")

    with pytest.raises(RuntimeError, match="the user's own error"):
        capture(task, step)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in task.modules())


def test_isolated_rng_gives_all_three_generators_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    def reset() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    reset()
    expected = draw()
    reset()
    with isolated_rng():
        draw()
    assert draw() == expected

    reset()
    with suppress(KeyError), isolated_rng(seed=3):
        draw()
        raise KeyError
    assert draw() == expected


def test_isolated_rng_starts_from_its_seed() -> None:
    draws = []
    for seed in (3, 3, 4):
        with isolated_rng(seed):
            draws.append((random.random(), float(np.random.random()), float(torch.rand(()))))

    assert draws[0] == draws[1]
    assert all(first != second for first, second in zip(draws[0], draws[2], strict=True))


def test_unchanged_gives_gradients_and_flags_back() -> None:
    net = Backbone()
    net.head.requires_grad_(False)
    net.conv.weight.grad = torch.ones_like(net.conv.weight)
    with unchanged(net):
        net.requires_grad_(False)
        net.head.requires_grad_(True)
        net.conv.weight.grad = None

    assert net.conv.weight.requires_grad
    assert not net.head.weight.requires_grad
    assert torch.equal(net.conv.weight.grad, torch.ones_like(net.conv.weight))
