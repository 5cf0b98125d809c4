"""What a training step through rounding asks of a device, counted, and that doing it all at once changes no number."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import CASES, Case, ResidualNet
from one_by_one import one_by_one
from reference_models import resnet18
from residual_nets import LARGE, observing_residual
from step_count import Count, as_on_a_gpu, count, forward_and_backward
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.learned_steps import LearnedSteps
from lightning_quant.ranges.observers import MinMax, MovingAverage


@functools.cache
def counted_float(dtype: torch.dtype | None) -> Count:
    return counted(None, nullcontext(), dtype)


def counted(phase: str | None, where: Any, dtype: torch.dtype | None = None) -> Count:
    torch.manual_seed(0)
    with where:
        return count(forward_and_backward(resnet18().train(), LARGE, phase, dtype))


# --- counts: ResNet18, forward and backward, 31 rounded tensors and 21 rounded weights


@pytest.mark.parametrize(
    ("phase", "where", "dtype", "more"),
    [
        ("observe", nullcontext, None, 38),
        ("fake_quantize", nullcontext, None, 318),
        ("frozen", nullcontext, None, 257),
        ("fake_quantize", as_on_a_gpu, None, 79),
        ("frozen", as_on_a_gpu, None, 54),
        ("fake_quantize", as_on_a_gpu, torch.bfloat16, 58),
        ("frozen", as_on_a_gpu, torch.bfloat16, 33),
    ],
)
def test_a_step_takes_no_more_operations_than_these_beside_the_float_ones(
    phase: str, where: Callable[[], Any], dtype: torch.dtype | None, more: int
) -> None:
    floating, ours = counted_float(dtype), counted(phase, where(), dtype)

    assert ours.num_operations <= floating.num_operations + more, ours.operations - floating.operations


def test_nothing_is_read_on_the_host_on_the_way_of_a_gpu() -> None:
    assert counted("fake_quantize", as_on_a_gpu()).operations["read on the host"] == 0


def test_a_step_of_large_images_moves_few_more_bytes_than_the_float_one() -> None:
    image = torch.randn(2, 3, 96, 96)
    model = ResidualNet().train()
    floating = count(forward_and_backward(model, image))
    for phase, most in (("fake_quantize", 1.15), ("frozen", 1.15)):
        with as_on_a_gpu():
            ours = count(forward_and_backward(copy.deepcopy(model), image, phase))
        assert ours.num_bytes <= most * floating.num_bytes


# --- the same numbers


def trained(case: Case, phase: str, where: Any, recipe: str = "int8") -> tuple[list[Tensor], dict[str, Any]]:
    """Return results and gradients of two runs in training mode, and the state that they leave."""
    torch.manual_seed(3)
    model = case.build()
    args, kwargs = case.call(4)
    prepared = prepare(model, args, kwargs, recipe=recipe)
    if recipe == "int4_weights":
        prepared.learned_steps = LearnedSteps(1e-3)
    model.train()
    with prepared.attached("observe", observing=True):
        for _ in range(2):
            model(*args, **kwargs)
    found: list[Tensor] = []
    torch.manual_seed(4)
    with where, prepared.attached(phase, observing=True):
        for _ in range(2):
            result = model(*args, **kwargs)
            leaves = pytree.tree_leaves(
                vars(result) if not isinstance(result, Tensor | tuple | list | dict) else result
            )
            results = [leaf for leaf in leaves if is_float(leaf)]
            sum(leaf.square().sum() for leaf in results).backward()
            found += [leaf.detach() for leaf in results]
    found += [p.grad for p in model.parameters() if p.grad is not None]
    steps = prepared.learned_steps
    found += [] if steps is None else [s.grad for s in steps.logarithms.values() if s.grad is not None]
    return found, prepared.ranges.state_dict()


@contextmanager
def half_by_default(where: Callable[[], Any]) -> Iterator[None]:
    """Let tensors that are made from nothing be half precision, as in the steps of Lightning's "16-true"."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with where():
            yield
    finally:
        torch.set_default_dtype(before)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("where", [nullcontext, as_on_a_gpu])
@pytest.mark.parametrize("phase", ["observe", "fake_quantize"])
def test_a_default_of_half_precision_changes_no_number(phase: str, where: Callable[[], Any]) -> None:
    case = next(case for case in CASES if case.name == "residual")
    found, state = trained(case, phase, half_by_default(where))
    expected, expected_state = trained(case, phase, where())

    for actual, value in zip(found, expected, strict=True):
        assert torch.equal(actual, value)
    for identity, saved in expected_state.items():
        assert all(
            torch.equal(torch.as_tensor(state[identity][name]), torch.as_tensor(value))
            and torch.as_tensor(state[identity][name]).dtype == torch.as_tensor(value).dtype
            for name, value in saved.items()
        )


@pytest.mark.parametrize("recipe", ["int8", "int4_weights"])
@pytest.mark.parametrize("case", [case for case in CASES if case.exports], ids=lambda case: case.name)
def test_all_at_once_gives_the_numbers_of_one_by_one(case: Case, recipe: str) -> None:
    together, state = trained(case, "frozen", nullcontext(), recipe)
    apart, other_state = trained(case, "frozen", one_by_one(), recipe)

    assert len(together) == len(apart) > 0
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert str(state) == str(other_state)


@pytest.mark.parametrize("phase", ["fake_quantize", "frozen_batch_norm"])
def test_the_way_of_a_gpu_gives_the_numbers_of_the_cpu(phase: str) -> None:
    here, state = trained(CASES[0], phase, nullcontext())
    there, other_state = trained(CASES[0], phase, as_on_a_gpu())

    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert str(state) == str(other_state)


# --- ranges: what a run sees counts from the next one on


@pytest.mark.parametrize("kind", [MinMax, MovingAverage])
def test_observers_updated_together_are_those_updated_alone(kind: Any) -> None:
    together, alone = [kind() for _ in range(3)], [kind() for _ in range(3)]
    for batch in range(1, 30):
        data = [torch.randn(50) * (number + 1) for number in range(3)]
        # The last one is reached in every other batch.
        reached = 3 if batch % 2 else 2
        for observer, x in zip(alone[:reached], data, strict=False):
            observer.update(x)
        lows, highs = torch.stack([x.min() for x in data[:reached]]), torch.stack([x.max() for x in data[:reached]])
        kind.update_all(together[:reached], lows, highs)

    assert [o.state() for o in together] == [o.state() for o in alone]


def test_gradients_of_gradients_pass_a_kernel() -> None:
    model, prepared = observing_residual()
    prepared.set_phase("observe")
    model(LARGE)
    prepared.set_phase("frozen")

    def penalty() -> list[Tensor]:
        x = LARGE.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.softplus(model(x)).sum(), x, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), [model.conv1.weight, model.fc.weight]))

    model.eval()
    here = penalty()
    with as_on_a_gpu():
        there = penalty()
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other)
