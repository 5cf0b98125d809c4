"""A prepared module under `torch.compile`: one graph in every phase, and the numbers of the module as it is."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import ResidualNet, with_statistics
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.learned_steps import LearnedSteps
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.simulate.quantizers import PHASES

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def residual() -> tuple[ResidualNet, Prepared]:
    torch.manual_seed(0)
    model = with_statistics(ResidualNet()).train()
    return model, prepare(model, (IMAGE,))


def step(model: Any, prepared: Prepared, image: Tensor = IMAGE) -> list[Tensor]:
    """Do what the callback does in a training batch; return result and gradients."""
    prepared.observing = True
    if prepared.quantizes:
        prepared.ranges.grids()
    result = model(image)
    result.square().sum().backward()
    prepared.observing = False
    prepared.ranges.settle()
    parameters = list(prepared.root.parameters())
    gradients = [p.grad.clone() for p in parameters if p.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return [result.detach(), *gradients]


def num_breaks() -> int:
    return sum(counters["graph_break"].values())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_each_phase_is_one_graph_with_the_numbers_of_the_module_as_it_is(backend: str) -> None:
    plain, plainly = residual()
    module, prepared = residual()
    plainly.attach()
    prepared.attach()
    compiled = torch.compile(module, backend=backend)
    # The first call of a structure traces it for the plan, which no compiler looks into.
    prepared.set_phase("observe")
    plainly.set_phase("observe")
    step(plain, plainly)
    step(compiled, prepared)
    before = num_breaks()
    for number, phase in enumerate(PHASES[1:], 1):
        for which in (plainly, prepared):
            which.set_phase(phase)
        for _ in range(3):
            for one, other in zip(step(plain, plainly), step(compiled, prepared), strict=True):
                torch.testing.assert_close(one, other, atol=0, rtol=0)
        assert num_breaks() == before
        assert counters["stats"]["unique_graphs"] == number, phase
    assert str(plainly.ranges.state_dict()) == str(prepared.ranges.state_dict())


def hooked(model: nn.Module, prepared: Prepared) -> None:
    model.conv1.register_forward_hook(lambda module, args, output: None)  # type: ignore[union-attr, operator]


def learning(model: nn.Module, prepared: Prepared) -> None:
    prepared.learned_steps = LearnedSteps(1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("change", [hooked, learning])
def test_what_compilers_cannot_follow_runs_beside_them(change: Any) -> None:
    plain, plainly = residual()
    module, prepared = residual()
    compiled = torch.compile(module, backend="eager")
    for model, which in ((plain, plainly), (module, prepared)):
        change(model, which)
        which.attach()
    for phase in ("observe", "fake_quantize", "frozen"):
        for which in (plainly, prepared):
            which.set_phase(phase)
        for _ in range(2):
            for one, other in zip(step(plain, plainly), step(compiled, prepared), strict=True):
                torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_several_calls_of_a_step_count_one_by_one() -> None:
    module, prepared = residual()
    compiled = torch.compile(module, backend="eager")
    prepared.attach()
    prepared.set_phase("observe")
    prepared.observing = True
    for _ in range(3):
        compiled(IMAGE)

    assert {observer.num_updates for observer in prepared.ranges.observers.values()} == {3}


def test_evaluation_computes_integers_under_a_compiler_too() -> None:
    module, prepared = residual()
    compiled = torch.compile(module, backend="eager")
    prepared.attach()
    prepared.set_phase("observe")
    step(compiled, prepared)
    prepared.set_phase("frozen")
    step(compiled, prepared)
    module.eval()
    with torch.no_grad():
        assert torch.equal(compiled(IMAGE), module(IMAGE))
