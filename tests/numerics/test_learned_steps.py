"""Learned steps: gradients against the paper's equation, and a training that leaves the user's run alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import EnoughError, StopAfterTraining, equal_tensors, fit, make_trainer, seeded, tensors_of
from torch import Tensor

import lightning_quant as lq
from lightning_quant.numerics.grid import activation_grid
from lightning_quant.numerics.learned_steps import (
    LearnedSteps,
    first_range,
    quantize_with_learned_range,
    quantize_with_learned_step,
)

# What tiny nets are compared by says that they are not smaller or faster.
pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


def reference(weight: Tensor, step: Tensor, quant_max: int) -> Tensor:
    """Write equation 1 with straight-through rounding alone, so that autograd gives equations 3 and 5."""
    ratio = (weight / step[:, None]).clamp(-quant_max, quant_max)
    return (ratio + (ratio.round() - ratio).detach()) * step[:, None]


def test_gradients_are_those_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 40, generator=generator)
    step = torch.full((5,), 0.2)
    seed = torch.randn(5, 40, generator=generator)
    results = []
    for function in (reference, quantize_with_learned_step):
        w, s = weight.clone().requires_grad_(), step.clone().requires_grad_()
        y = function(w, s, 7)
        (y * seed).sum().backward()
        results.append((y.detach(), w.grad, s.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert bool((results[1][1] == 0).any()), "some weights must be clipped for this test to say anything"


def test_gradients_of_a_range_are_those_of_the_paper() -> None:
    """With straight-through rounding alone, also of the zero point, autograd gives the equations of LSQ+."""
    generator = torch.Generator().manual_seed(1)
    x, seed = torch.randn(300, generator=generator), torch.randn(300, generator=generator)
    grid = activation_grid(4)
    results = []
    for is_ours in (False, True):
        values = torch.tensor([math.log(0.2), 0.42]).requires_grad_()
        leaf = x.clone().requires_grad_()
        if is_ours:
            y = quantize_with_learned_range(leaf, values, grid)
        else:
            step, zero = values[0].exp(), values[1] * 15
            zero = zero + (zero.round() - zero).detach()
            ratio = leaf / step
            integers = ratio + (ratio.round() - ratio).detach() + zero
            y = (integers.clamp(0, 15) - zero) * step
        (y * seed).sum().backward()
        results.append((y.detach(), leaf.grad, values.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert bool((results[1][1] == 0).any()), "some values must be clipped for this test to say anything"


def test_the_first_range_of_four_bits_has_the_papers_step_and_that_of_eight_ends_where_the_data_does() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    mean = float(x.abs().mean())
    low, high = (float(end) for end in first_range(x.relu() + 0.01, activation_grid(4)))
    assert low == 0
    assert high == pytest.approx(15 * 2 * (mean / 2 + 0.01) / 15**0.5, rel=0.05)
    low, high = (float(end) for end in first_range(torch.cat([x, torch.tensor([-9.0, 9.0])]), activation_grid(4)))
    assert (high - low) / 15 == pytest.approx(2 * mean / 7**0.5, rel=0.02)
    assert -low == pytest.approx(high * 8 / 7)
    low, high = (float(end) for end in first_range(x.clamp(-1, 1), activation_grid(4)))
    assert high > 1.5
    assert first_range(x, activation_grid(8)) == (x.min(), x.max())


@pytest.mark.parametrize(("x", "share"), [(torch.linspace(0, 5, 90), 0.0), (torch.linspace(-5, 0, 90), 1.0)])
def test_zero_stays_at_the_end_of_a_range(x: Tensor, share: float) -> None:
    """Behind a ReLU, integers below zero would stand for nothing."""
    values = torch.tensor([math.log(0.2), share]).requires_grad_()
    (quantize_with_learned_range(x, values, activation_grid(4)) - x).square().sum().backward()
    assert values.grad is not None
    assert float(values.grad[0]) != 0
    assert float(values.grad[1]) == 0


def test_processes_begin_with_the_mean_of_their_ranges_and_stay_alike() -> None:
    """Each process meets its own batch first; what each hands over to be averaged is recorded, and then averaged."""
    grid = activation_grid(4)

    def run(scale: float, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        steps = LearnedSteps(0.01)
        values = steps.range_of("e", lambda: (torch.tensor(scale), torch.tensor(6.0)), grid)
        quantize_with_learned_range(torch.linspace(-3, 5, 50) * scale, values, grid).square().sum().backward()
        steps.update(reduce)
        return steps.logarithms["edges e"].detach()

    def replayed(values: list[Tensor]) -> Callable[[Tensor], Tensor]:
        left = iter(values)
        return lambda _: next(left)

    handed: list[list[Tensor]] = [[], []]
    for seen, scale in zip(handed, (0.1, 0.4), strict=True):
        run(scale, lambda values, seen=seen: seen.append(values.clone()) or values)
    means = [torch.stack(pair).mean(0) for pair in zip(*handed, strict=True)]
    ended = [run(scale, replayed(means)) for scale in (0.1, 0.4)]
    assert torch.equal(*ended)
    assert abs(float(ended[0][0]) - math.log(0.2)) <= 0.011


def test_steps_fall_to_the_error_they_cause() -> None:
    weight = torch.randn(3, 400, generator=torch.Generator().manual_seed(1))
    steps = LearnedSteps(learning_rate=0.02)
    first = steps.step_of("layer", weight, 3).detach()
    least = float((quantize_with_learned_step(weight, first, 3) - weight).square().mean())
    steps.logarithms["layer"].data.add_(0.7)
    errors = []
    for _ in range(100):
        rounded = quantize_with_learned_step(weight, steps.step_of("layer", weight, 3), 3)
        loss = (rounded - weight).square().mean()
        errors.append(float(loss.detach()))
        loss.backward()
        steps.update()
    by_maximum = weight.abs().amax(1, keepdim=True) / 3
    assert errors[-1] < 0.7 * errors[0]
    # They begin with the least error that there is.
    assert errors[-1] > 0.98 * least
    assert errors[-1] < 0.7 * float((torch.round(weight / by_maximum) * by_maximum - weight).square().mean())


def test_state_continues_where_it_was() -> None:
    weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))

    def train(steps: LearnedSteps, number: int) -> None:
        for _ in range(number):
            quantize_with_learned_step(weight, steps.step_of("layer", weight, 3), 3).square().sum().backward()
            steps.update()

    straight, resumed = LearnedSteps(0.05), LearnedSteps(0.05)
    train(straight, 6)
    half = LearnedSteps(0.05)
    train(half, 3)
    resumed.load_state_dict(half.state_dict(), torch.device("cpu"))
    train(resumed, 3)
    assert torch.equal(straight.logarithms["layer"], resumed.logarithms["layer"])


def test_steps_slow_down_with_the_learning_rate_of_the_weights() -> None:
    """Each optimizer of the user has its own; what moves on at the end keeps weights from settling."""
    weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))

    def moves(steps: LearnedSteps, *rates: tuple[int, float]) -> list[float]:
        moved = []
        for rate in rates:
            quantize_with_learned_step(weight, steps.step_of("layer", weight, 3), 3).sum().backward()
            before = steps.logarithms["layer"].detach().clone()
            steps.update(rate=rate)
            moved.append(float((steps.logarithms["layer"].detach() - before).abs().max()))
        return moved

    steps = LearnedSteps(0.01)
    warm, peak, late, end, other = moves(steps, (0, 0.2), (0, 0.4), (0, 0.04), (0, 0.0), (1, 0.001))
    assert warm == pytest.approx(0.01, rel=0.3)
    assert peak == pytest.approx(0.01, rel=0.3)
    assert late == pytest.approx(0.001, rel=0.3)
    assert end == 0
    assert other == pytest.approx(0.01, rel=0.3)
    resumed = LearnedSteps(0.01)
    resumed.load_state_dict(steps.state_dict(), torch.device("cpu"))
    assert moves(resumed, (0, 0.04)) == moves(steps, (0, 0.04))


def test_gradients_that_are_not_finite_move_nothing() -> None:
    steps = LearnedSteps(0.1)
    weight = torch.ones(2, 3)
    before = steps.step_of("layer", weight, 7).detach()
    (steps.step_of("layer", weight, 7) * torch.tensor([float("inf"), 1.0])).sum().backward()
    steps.update()
    assert torch.equal(steps.step_of("layer", weight, 7), before)


def test_a_second_optimizer_does_not_move_them_again() -> None:
    weight = torch.randn(2, 30, generator=torch.Generator().manual_seed(3))
    steps = LearnedSteps(0.1)
    for _ in range(2):
        quantize_with_learned_step(weight, steps.step_of("layer", weight, 7), 7).square().sum().backward()
        steps.update()
    before = steps.step_of("layer", weight, 7).detach()
    steps.update()
    assert torch.equal(steps.step_of("layer", weight, 7), before)


def test_a_fit_owns_its_steps_and_leaves_the_users_state_alone(tmp_path: Path) -> None:
    callback = lq.QuantizationAwareTraining("int4_weights", output_dir=tmp_path / "artifact", threads=1)
    model = seeded()
    trainer = fit(model, callback, max_epochs=2, default_root_dir=tmp_path)
    steps = callback.require_prepared().learned_steps
    assert steps is not None
    weighted = {i for i, operator in callback.require_prepared().operators.items() if operator.weight}
    assert set(steps.logarithms) == weighted
    number = sum(len(group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
    assert number == len(list(model.parameters()))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert len(saved["optimizer_states"][0]["param_groups"][0]["params"]) == number
    fit(seeded(), max_epochs=2, default_root_dir=tmp_path).save_checkpoint(tmp_path / "float.ckpt")
    plain = torch.load(tmp_path / "float.ckpt", weights_only=True)
    (ours,), (floats,) = saved["optimizer_states"], plain["optimizer_states"]
    assert ours["param_groups"] == floats["param_groups"]
    assert _shapes(ours["state"]) == _shapes(floats["state"])
    assert saved["state_dict"].keys() == plain["state_dict"].keys()
    state = saved["callbacks"][callback.state_key]["learned_steps"]
    assert set(state["logarithms"]) == weighted
    assert "optimizer" in state
    assert callback.artifact is not None
    parity = callback.artifact.report["parity"]
    assert float(parity["artifact_db"]) > float(parity["quantization_db"])
    prepared = callback.require_prepared()
    for identity in weighted:
        folded = prepared.folded(identity)
        step = steps.step_of(identity, prepared.weight(identity), prepared.weight_quant_max(identity)).detach()
        torch.testing.assert_close(folded.unfolded_scale, step)
        assert int(prepared.weight_integers(identity, folded).abs().max()) <= prepared.weight_quant_max(identity)


def test_ranges_are_learned_until_they_are_frozen_and_the_file_has_them(tmp_path: Path) -> None:
    callback = lq.QuantizationAwareTraining("int4", output_dir=tmp_path / "artifact", threads=1)
    seen: list[tuple[str, dict[str, Tensor]]] = []

    def look(steps: LearnedSteps, *args: Any, **kwargs: Any) -> None:
        prepared = callback.require_prepared()
        edges = {name: v.detach().clone() for name, v in steps.logarithms.items() if name.startswith("edges ")}
        seen.append((prepared.phase, edges))
        update(steps, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        update = LearnedSteps.update
        patch.setattr(LearnedSteps, "update", look)
        fit(seeded(), callback, max_epochs=4, default_root_dir=tmp_path)
    learning = [edges for phase, edges in seen if phase == "fake_quantize"]
    frozen = [edges for phase, edges in seen if phase == "frozen"]
    assert len(frozen) > 1
    assert any(not torch.equal(learning[0][name], learning[-1][name]) for name in learning[0])
    assert all(torch.equal(frozen[0][name], frozen[-1][name]) for name in frozen[0])

    prepared = callback.require_prepared()
    for identity, edge in prepared.ranges.edges.items():
        scale, _ = prepared.ranges.parameters(identity)
        learned = frozen[-1].get(f"edges {edge.shared}")
        # Those that keep eight bits follow the data.
        assert prepared.ranges.grid_of(identity).num_levels == (256 if learned is None else 16)
        if learned is not None:
            torch.testing.assert_close(scale.log(), learned[0])
    assert {prepared.ranges.grid_of(identity).num_levels for identity in prepared.ranges.edges} == {16, 256}
    assert callback.artifact is not None
    assert callback.artifact.report["parity"]["worst_share"] == 1.0


class Grids(Callback):
    """Records the integers of rounding at every training batch."""

    def __init__(self, callback: lq.QuantizationAwareTraining) -> None:
        self.callback, self.seen, self.weights = callback, [], []

    def on_train_batch_end(self, *_: Any) -> None:
        prepared = self.callback.require_prepared()
        assert prepared.learned_steps is not None
        inner = next(i for i, operator in prepared.operators.items() if operator.path + operator.key == "conv2")
        levels = {prepared.ranges.grid_of(edge).num_levels for edge in prepared.ranges.edges}
        self.seen.append((min(levels), max(levels), prepared.weight_quant_max(inner)))
        if inner in prepared.learned_steps.logarithms:
            ratio = prepared.weight(inner).abs().amax() / prepared.learned_steps.logarithms[inner].exp().min()
            self.weights.append(float(ratio.detach()))


def annealed(folder: Path, epochs: int, **options: Any) -> tuple[Any, Grids]:
    """Train some of eight epochs, in the second to the fifth of which bits are annealed."""
    points = {"fake_quantize": 1, "anneal_bits_until": 5, "freeze_observers": 7, "unit": "epochs"}
    callback = lq.QuantizationAwareTraining("int4", output_dir=folder / "artifact", schedule=points, threads=1)
    model, grids = seeded(), Grids(callback)
    keep = ModelCheckpoint(folder, f"last{epochs}", monitor=None)
    settings = {"max_epochs": epochs, "limit_val_batches": 0, "enable_checkpointing": True}
    trainer = make_trainer(callback, grids, keep, StopAfterTraining(), **settings)
    with pytest.raises(EnoughError):
        trainer.fit(model, **options)
    return model, grids


def test_bits_are_annealed_from_eight_to_the_recipes(tmp_path: Path) -> None:
    _, grids = annealed(tmp_path, 6)
    seen = [one for one, again in zip(grids.seen, [None, *grids.seen], strict=False) if one != again]
    assert seen == [(256, 256, 127), (128, 256, 63), (64, 256, 31), (32, 256, 15), (16, 256, 7)]
    # Weights take up the integers that there are: the steps follow.
    assert 7 < grids.weights[0] < 400
    assert grids.weights[0] > 5 * grids.weights[-1]


@pytest.mark.slow
def test_a_run_resumed_while_bits_are_annealed_goes_on_as_it_was(tmp_path: Path) -> None:
    model, grids = annealed(tmp_path, 8)
    annealed(tmp_path, 3)
    resumed, again = annealed(tmp_path, 8, ckpt_path=tmp_path / "last3.ckpt")
    assert again.seen == grids.seen[-len(again.seen) :]
    assert equal_tensors(tensors_of(model), tensors_of(resumed))


@pytest.mark.slow
def test_a_run_that_ends_while_bits_are_annealed_has_a_file_of_the_recipes_bits(tmp_path: Path) -> None:
    schedule = lq.Schedule(fake_quantize=0.0, anneal_bits_until=9, freeze_observers=9, unit="epochs")
    callback = lq.QuantizationAwareTraining("int4", output_dir=tmp_path / "artifact", schedule=schedule, threads=1)
    fit(seeded(), callback, max_epochs=1, default_root_dir=tmp_path)
    assert callback.artifact is not None
    assert callback.artifact.report["parity"]["worst_share"] == 1.0
    prepared = callback.require_prepared()
    assert {prepared.ranges.grid_of(edge).num_levels for edge in prepared.ranges.edges} == {16, 256}


def test_the_report_of_a_training_says_which_operator_costs_what(tmp_path: Path) -> None:
    callback = lq.QuantizationAwareTraining(
        {"name": "int4_weights", "batch_norm_batches": 2}, output_dir=tmp_path / "artifact", threads=1, sensitivity=True
    )
    fit(seeded(), callback, max_epochs=1, default_root_dir=tmp_path)
    assert callback.artifact is not None
    found = callback.artifact.report["sensitivity"]
    assert {layer["name"] for layer in found["layers"]} == {"conv1", "conv2", "head", "add"}
    assert set(found["gains"]) == {row["name"] for row in callback.artifact.report["metrics"]}
    # It is the exported numbers that were ranked.
    whole = -10 * math.log10(found["error"])
    assert whole == pytest.approx(float(callback.artifact.report["parity"]["quantization_db"]), abs=3)


@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_recipes_without_a_rate_learn_no_steps(tmp_path: Path, rate: float) -> None:
    recipe = lq.Recipe(learned_step_rate=rate)
    callback = lq.QuantizationAwareTraining(recipe, output_dir=tmp_path / "artifact", evaluate=False, threads=1)
    fit(seeded(), callback, max_epochs=1, default_root_dir=tmp_path)
    assert (callback.require_prepared().learned_steps is not None) == (rate > 0)


def _shapes(state: Any) -> Any:
    return {key: _shapes(value) for key, value in state.items()} if isinstance(state, dict) else tuple(state.shape)
